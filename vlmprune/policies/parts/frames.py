"""A batch's videos frame by frame: cut out as ``[I, F, P]``, a frame against the one before it, runs of frames."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from torch.nn.utils.rnn import pad_sequence

from vlmprune import ops
from vlmprune.constants import remembered, whole_numbers
from vlmprune.policies.base import Grid, PruningPolicy, TokenContext
from vlmprune.policies.counts import even_shares
from vlmprune.policies.crops import crops_of
from vlmprune.policies.groups import Counts, Groups, places_of, rows_or
from vlmprune.policies.parts.lattice import grid_scores


@dataclass(frozen=True)
class Frames:
    """The frames of the I images and videos of a batch, at most F of one and P tokens in each.

    What the tower sees as one image is a frame: a video's frame (a pair of them in Qwen-VL), and also the small view or a tile
    of an image that is cut up, in their order; any other image is a video of one frame. A newline token is of none.

    Attributes:
        groups: the same frames as a list, as ``crops_of`` gives them.
    """

    groups: Groups

    @cached_property
    def counts(self) -> Counts:
        """Of each image, how many frames it has."""
        return tuple(map(len, self.groups.members))

    @property
    def most(self) -> int:
        """F, the frames of the longest video."""
        return max(self.counts, default=0)

    @cached_property
    def grids(self) -> tuple[Grid, ...]:
        """Rows and columns of each of the G frames."""
        return tuple((crop.rows, crop.columns) for crop in self.groups.crops)

    def before(self, steps: int = 1) -> Counts:
        """Of each of the G frames, which one (of the G) stands so many before it in its video; -1 = none of its shape."""
        out = []
        for own in self.groups.members:
            earlier = zip((*[-1] * min(steps, len(own)), *own), own, strict=False)
            out += [e if e >= 0 and self.grids[e] == self.grids[g] else -1 for e, g in earlier]
        return tuple(out)

    def same_place(self, others: Counts, device: torch.device) -> Tensor:
        """``[B, N]`` int64 the token in each one's place in another frame of its sample, ``others[g]`` for the g-th; -1 = none."""
        return _same_place(self.groups, others, device)

    def there(self, device: torch.device) -> Tensor:
        """``[I, F]`` bool, False behind the frames of a shorter video."""
        return self._numbers(device) >= 0

    def real(self, device: torch.device) -> Tensor:
        """``[I, F, P]`` bool, False where there is no token: behind a smaller frame's, and of frames that are not there."""
        sizes = whole_numbers(self.groups.tokens, device)
        places = torch.arange(max(self.groups.tokens, default=0), device=device)
        return self.lay(places < sizes[:, None])

    def follows(self, device: torch.device) -> Tensor:
        """``[I, F]`` bool, True where the frame before is of the same shape, so that places can be compared."""
        return self.lay(whole_numbers(self.before(), device) >= 0)

    def lay(self, x: Tensor) -> Tensor:
        """``[G, ...]``, one row for each of the G frames of the batch, as ``[I, F, ...]``; zeros for those not there."""
        at = self._numbers(x.device)
        if min(self.counts, default=0) == self.most:
            return x.reshape(*at.shape, *x.shape[1:])
        return rows_or(x[:, None], at, 0)

    def flat(self, x: Tensor) -> Tensor:
        """The other way round: ``[I, F, ...]`` as ``[G, ...]``."""
        rows = x.flatten(0, 1)
        return rows if len(rows) == len(self.groups.crops) else rows[self._places(x.device)]

    def split(self, x: Tensor) -> Tensor:
        """Cut ``x [B, N, ...]`` into frames ``[I, F, P, ...]``; zeros where there is no token."""
        return self.lay(self.groups.split(x))

    def spread(self, x: Tensor, fill: float = 0) -> Tensor:
        """Put ``x [I, F, P, ...]`` back in its tokens' places, ``[B, N, ...]``; ``fill`` elsewhere (padding, newlines)."""
        return self.groups.spread(self.flat(x), fill)

    def _numbers(self, device: torch.device) -> Tensor:
        """``[I, F]`` which of the G frames, -1 = none."""
        lines = tuple((*own, *[-1] * (self.most - len(own))) for own in self.groups.members)
        return whole_numbers(lines, device).view(len(lines), self.most)

    def _places(self, device: torch.device) -> Tensor:
        """``[G]`` where each frame is in ``[I F]``."""
        at = (i * self.most + t for i, own in enumerate(self.groups.members) for t in range(len(own)))
        return whole_numbers(tuple(at), device)


def frames_of(ctx: TokenContext) -> Frames:
    """Where the frames lie. Raises InputError if an earlier stage or chunked prefill left a part of their tokens.

    Example:
        >>> frames_of(ctx).counts, frames_of(ctx).split(ctx.ordinals).shape  # images of four tokens, each one frame
        ((1, 1, 1), torch.Size([3, 1, 4]))
    """
    return Frames(crops_of(ctx))


def budgets_of(ctx: TokenContext, policy: PruningPolicy) -> Counts:
    """How many tokens the policy keeps of each of the I images and videos of the batch."""
    return tuple(policy.kept(n, 1, ctx.layer) for own in ctx.images() for n in own)


def cosine_at(x: Tensor, other: Tensor) -> Tensor:
    """Cosine of every token of ``x [B, N, D]`` with that in the place ``other [B, N]`` of its sample: ``[B, N]`` float32.

    -1 where ``other`` is below 0. A row of zeros has cosine 0.
    """
    return cosine_similarity(x.float(), ops.gather_tokens([x], other)[0].float(), dim=-1).masked_fill(
        other < 0, -1.0
    )


def frame_means(x: Tensor, real: Tensor) -> Tensor:
    """Mean row of every frame of ``x [I, F, P, D]``, over the tokens that are ``real [I, F, P]``: ``[I, F, D]`` float32.

    Zeros for a frame that is not there.
    """
    total = x.float().masked_fill(~real[..., None], 0.0).sum(2)
    return total / real.sum(2).clamp(min=1)[..., None]


def run_numbers(starts: Tensor, there: Tensor) -> Tensor:
    """Which run (segment) of its video each frame is in: ``[I, F]`` int64, 0, 1, ..., -1 for frames not ``there [I, F]``.

    ``starts [I, F]`` bool says where a new run begins; the first frame begins one in any case.

    Example:
        >>> starts = torch.tensor([[False, False, True, False]])
        >>> run_numbers(starts, torch.tensor([[True, True, True, False]]))
        tensor([[ 0,  0,  1, -1]])
    """
    later = starts.long()
    later = torch.cat([torch.zeros_like(later[:, :1]), later[:, 1:]], 1)
    return later.cumsum(1).masked_fill(~there, -1)


def over_runs(x: Tensor, runs: Tensor) -> Tensor:
    """Sums of ``x [I, F, ...]`` over the frames of each run, ``runs [I, F]`` as ``run_numbers`` gives: ``[I, F, ...]`` float32.

    Row r is that of run r, zeros where a video has fewer runs. A mean is this over ``over_runs`` of ones. The order of
    summing depends on shapes alone. Rows of frames that are not there must be finite (those of ``split`` are zeros).

    Example:
        >>> over_runs(torch.tensor([[1.0, 2, 4]]), torch.tensor([[0, 0, 1]]))
        tensor([[3., 4., 0.]])
    """
    rows = x.float().reshape(*runs.shape, x[0, 0].numel() if runs.numel() else 0)
    of = runs[:, None, :] == torch.arange(runs.shape[1], device=runs.device)[:, None]
    return (of.float() @ rows).view(x.shape)


def anchors_first(frames: Frames, anchors: Counts, budgets: Counts) -> Counts:
    """How many tokens of each of the G frames stay, where those of the frames ``anchors`` come before all others.

    The anchors share each image's budget evenly, and what they cannot take the other frames.

    Example:
        >>> anchors_first(frames_of(ctx), (1,), [3, 6, 2])
        (3, 4, 2)
    """
    kept = [0] * len(frames.grids)
    for own, budget in zip(frames.groups.members, budgets, strict=True):
        for some in ([g for g in own if g in anchors], [g for g in own if g not in anchors]):
            sizes = [frames.groups.tokens[g] for g in some]
            shares = even_shares(min(budget, sum(sizes)), sizes)
            budget -= sum(shares)
            for g, share in zip(some, shares, strict=True):
                kept[g] = share
    return tuple(kept)


def spread_evenly(frames: Frames, kept: Counts, device: torch.device) -> Tensor:
    """Scores ``[I, F, P]`` float32, at most 2, whose best ``kept[g]`` of the g-th frame lie evenly over it: those are >= 1."""
    return frames.lay(_even(frames.grids, kept, device))


@remembered()
def _even(grids: tuple[Grid, ...], kept: Counts, device: torch.device) -> Tensor:
    """``[G, P]``, zeros behind a smaller frame's tokens."""
    rows = [grid_scores(grid, k) for grid, k in zip(grids, kept, strict=True)]
    return (pad_sequence(rows, batch_first=True) if rows else torch.zeros(0, 0)).to(device)


@remembered()
def _same_place(groups: Groups, others: Counts, device: torch.device) -> Tensor:
    out = torch.full((groups.batch, groups.width), -1, dtype=torch.int64)
    for crop, other, sample in zip(groups.crops, others, groups.samples, strict=True):
        if other >= 0:
            out[sample, places_of(crop)] = torch.tensor(places_of(groups.crops[other]))
    return out.to(device)
