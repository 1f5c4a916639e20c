"""The batch seen image by image: where the images lie, budgets spent by image, vision attention, nearest rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlmprune.constants import whole_numbers
from vlmprune.errors import check, require
from vlmprune.policies.base import Positions, PruningPolicy, Ranking, TokenContext, VisionAttention
from vlmprune.policies.choose import padding, quotas
from vlmprune.policies.inputs import Rating


@dataclass(frozen=True)
class Images:
    """Where the I images of a call lie among the entering tokens; host ints only.

    Attributes:
        samples: which sample each image belongs to, ascending.
        firsts: each image's first place among its sample's tokens.
        tokens: how many tokens each image has.
        batch: B, how many samples there are.
        width: N, the places a sample has in the batch.
    """

    samples: tuple[int, ...]
    firsts: tuple[int, ...]
    tokens: tuple[int, ...]
    batch: int
    width: int

    def split(self, x: Tensor) -> Tensor:
        """Cut ``x [B, N, ...]`` into images ``[I, P, ...]``; P is the largest image's tokens, padding is zeros."""
        P = max(self.tokens, default=0)
        if set(self.tokens) == {P} and sum(self.tokens) == self.batch * self.width:
            return x.reshape(len(self.tokens), P, *x.shape[2:])
        samples, firsts, tokens = whole_numbers((self.samples, self.firsts, self.tokens), x.device)[..., None]
        inside = torch.arange(P, device=x.device)
        at = torch.where(inside < tokens, samples * self.width + firsts + inside, -1)
        return _rows(x, at, 0)

    def join(self, x: Tensor, kept: Sequence[int] | None = None, fill: int = 0) -> Tensor:
        """Line up the first ``kept[i]`` rows of every image of ``x [I, k, ...]``, None = all: ``[B, K, ...]``, then ``fill``."""
        counts = kept if kept is not None else [x.shape[1]] * len(self.samples)
        lines: list[list[int]] = [[] for _ in range(self.batch)]
        for image, (sample, count) in enumerate(zip(self.samples, counts, strict=True)):
            lines[sample] += range(image * x.shape[1], image * x.shape[1] + count)
        if lines and all(len(line) * self.batch == x.shape[0] * x.shape[1] for line in lines):
            # Nothing to leave out or to fill.
            return x.reshape(self.batch, -1, *x.shape[2:])
        K = max(map(len, lines), default=0)
        at = whole_numbers(tuple((*line, *[-1] * (K - len(line))) for line in lines), x.device)
        return _rows(x, at.view(self.batch, K), fill)

    def index(self, picked: Tensor, kept: Sequence[int] | None = None) -> Tensor:
        """Turn places within each image ``[I, k]`` into places within the sample ``[B, K]``, -1 on the right."""
        first = whole_numbers(self.firsts, picked.device)
        return self.join(picked + first[:, None], kept, fill=-1)


def _rows(x: Tensor, at: Tensor, fill: int) -> Tensor:
    """Rows ``at`` (-1 = ``fill``) of ``x`` with its first two dims run together."""
    flat = x.flatten(0, 1)
    if not len(flat):
        return x.new_full((*at.shape, *x.shape[2:]), fill)
    rows = flat[at.clamp(min=0)]
    return rows.masked_fill(at.view(*at.shape, *[1] * (x.ndim - 2)) < 0, fill)


def images_of(ctx: TokenContext) -> Images:
    """Where the images lie. Raises ValueError if an earlier stage has already dropped some of their tokens.

    Example:
        >>> images_of(ctx).firsts, images_of(ctx).tokens
        ((0, 0, 4), (4, 4, 4))
    """
    sizes = ctx.images()
    whole = tuple(map(sum, sizes))
    check(ctx.counts == whole, "ctx.counts", f"{whole}, every token of every image", ctx.counts)
    samples = tuple(sample for sample, own in enumerate(sizes) for _ in own)
    firsts = tuple(first for own in sizes for first in [*accumulate(own, initial=0)][:-1])
    return Images(samples, firsts, tuple(chain(*sizes)), *ctx.mask.shape)


def spent(
    ctx: TokenContext, policy: PruningPolicy, choose: Callable[..., Tensor], *tensors: Tensor
) -> Tensor:
    """Index ``[B, K]`` of what ``choose`` takes by the policy's counts from every prompt, or from every image of it.

    Args:
        ctx: the stage's context.
        policy: whose ``kept`` counts, and whose ``spend`` says of what.
        choose: ``choose_greedily`` of a rule, or alike: ``(counts, mask or None, *tensors)`` to places ``[G, k]``, ascending.
        tensors: ``[B, N, ...]``, what to choose by.

    Raises:
        InputError: by image, where images are not whole: after an earlier stage, or in prefill by chunks.

    Example:
        >>> from functools import partial
        >>> from vlmprune.policies import Random
        >>> from vlmprune.policies.choose import choose_greedily
        >>> farthest, line = partial(choose_greedily, "maxmin"), torch.tensor([[3.0, 1], [1, 1], [1, 2], [1, 4]])
        >>> features = line.repeat(2, 1).expand(2, 8, 2)
        >>> [spent(ctx, Random(keep=1, spend=by), farthest, features)[1] for by in ("image", "prompt")]
        [tensor([0, 4]), tensor([0, 3])]
    """
    if policy.spend == "prompt":
        return choose(quotas(ctx, policy), padding(ctx.counts, ctx.mask), *tensors)
    _whole_images(ctx)
    images = images_of(ctx)
    kept = [policy.kept(tokens, 1, ctx.layer) for tokens in images.tokens]
    if not kept:
        return ctx.ordinals
    mask = padding(images.tokens, images.split(ctx.mask))
    places = choose(kept, mask, *map(images.split, tensors))
    return images.index(places, kept)


def ranked(
    ctx: TokenContext,
    policy: PruningPolicy,
    scores: Tensor | Rating,
    positions: Positions = "keep",
    static: bool = False,
) -> Ranking:
    """The best by the policy's counts from every prompt or, where it spends by image, from every image of it.

    ``static`` is the ranking's: True if no tensor has been looked at for ``scores``, and none made.

    Raises:
        InputError: by image, where images are not whole: after an earlier stage, or in prefill by chunks.

    Example:
        >>> from vlmprune.policies import Random
        >>> best = torch.arange(8.0).expand(2, 8)
        >>> [ranked(ctx, Random(keep=1, spend=by), best).index(ctx)[1] for by in ("image", "prompt")]
        [tensor([3, 7]), tensor([6, 7])]
    """
    if policy.spend == "prompt":
        return Ranking(scores, tuple(quotas(ctx, policy)), positions=positions, static=static)
    images = _whole_images(ctx)
    keep = tuple(tuple(policy.kept(tokens, 1, ctx.layer) for tokens in own) for own in images)
    return Ranking(scores, keep, images, positions=positions, static=static)


def _whole_images(ctx: TokenContext) -> tuple[tuple[int, ...], ...]:
    check(ctx.whole, "spend", "'prompt' after an earlier stage, or in prefill by chunks", repr("image"))
    return ctx.images()


def vision_of(ctx: TokenContext, layer: int, images: Images) -> VisionAttention:
    """One vision layer's query and key, or an error that says what the policy forgot to declare."""
    name = f"ctx.vision[{layer}]"
    seen = require(ctx.vision.get(layer), name, f"query and key (declare Needs(vision=({layer},)))")
    patches = (seen.key.shape[2] - seen.cls) // seen.side**2
    fits = images.tokens == (patches,) * seen.key.shape[0]
    check(fits, name, f"images of {images.tokens} patches", f"{seen.key.shape[0]} of {patches}")
    return seen


def patch_attention(seen: VisionAttention) -> Tensor:
    """Attention the patches of every visual token receive, head mean, ``[I, tokens]`` float32.

    From CLS, or the mean over all rows without one.
    """
    return seen.per_token(seen.rating().scores())


def rows_at(x: Tensor, index: Tensor) -> Tensor:
    """Rows ``index [I, k]`` (no padding) of ``x [I, P, D]``: ``[I, k, D]``."""
    if len(x) == 1:  # the same, which a CPU does ten times faster
        return x.index_select(1, index[0])
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))


def nearest(rows: Tensor, targets: Tensor) -> Tensor:
    """Number ``[I, R]`` of the target ``[I, T, D]`` most cosine-similar to each row ``[I, R, D]``; ties to the first."""
    cosine = normalize(rows.float(), dim=-1) @ normalize(targets.float(), dim=-1).transpose(1, 2)
    return cosine.argmax(-1)
