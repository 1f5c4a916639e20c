"""A small model's scores of a prompt's visual tokens, as a guide of another model's pruning."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from vlmprune.errors import check
from vlmprune.policies.base import Grid, TokenContext, tokens_in


@dataclass(frozen=True, eq=False)
class Guidance:
    """Scores of one prompt's visual tokens (of a batch: of all its prompts), for ``SGL(guide=...)`` on the same prompt.

    Where another model has other grids for the same images, each grid's scores are resampled, bilinear with antialiasing,
    and keep their sum but for the edges. The paper uses models of one family, whose grids are the same; newline tokens are
    resampled as the column of the grid that they stand in.

    Attributes:
        scores: ``[B, N]`` float32, in prompt order, the higher survives.
        grids: per sample, the grids of its visual tokens.
        sizes: per sample, the visual tokens of each of its images.

    Raises:
        InputError: when called, another number of samples, of images, or of grids of an image; a prompt in chunks.
    """

    scores: Tensor
    grids: tuple[tuple[Grid, ...], ...]
    sizes: tuple[tuple[int, ...], ...]

    def __repr__(self) -> str:
        return f"Guidance(of {len(self.sizes)} prompts)"

    def __call__(self, ctx: TokenContext) -> Tensor:
        """``[B, N]`` for the tokens that enter a stage. No host read."""
        check(
            ctx.shares is None,
            "prefill_chunk_size",
            "None with a guide of whole prompts",
            "a prompt in chunks",
        )
        samples = f"the {len(self.sizes)} samples that the guide was made of"
        check(len(self.sizes) == len(ctx.counts), "guide", samples, len(ctx.counts))
        scores = self.scores.to(ctx.device)
        if ctx.grids != self.grids or ctx.images() != self.sizes:
            wanted = zip(ctx.grids, ctx.images(), strict=True)
            parts = [self._resampled(b, *sample) for b, sample in enumerate(wanted)]
            scores = nn.utils.rnn.pad_sequence(parts, batch_first=True)
        if not scores.shape[1]:
            return scores.new_zeros(ctx.mask.shape)
        return scores.gather(1, ctx.ordinals.clamp(min=0))

    def _resampled(self, sample: int, grids: Sequence[Grid], sizes: Sequence[int]) -> Tensor:
        """``[N']`` one sample's scores in other grids."""
        old, new = list(_by_image(self.grids[sample], self.sizes[sample])), list(_by_image(grids, sizes))
        one, other = ([len(image) for image in images] for images in (old, new))
        name = f"guide, sample {sample}"
        check(one == other, name, f"images of {one} grids, as the guide has seen them", f"of {other}")
        flat, wanted = self.grids[sample], [grid for image in new for grid in image]
        bounds = pairwise(accumulate(map(_cells, flat), initial=0))
        row = self.scores[sample]
        parts = [_resize(row[a:b], *pair) for (a, b), *pair in zip(bounds, flat, wanted, strict=True)]
        return torch.cat(parts) if parts else row[:0]


def _cells(grid: Grid) -> int:
    return tokens_in([grid])


def _by_image(grids: Sequence[Grid], sizes: Sequence[int]) -> Iterator[list[Grid]]:
    """The grids of each image."""
    rest = iter(grids)
    for size in sizes:
        image: list[Grid] = []
        while tokens_in(image) < size:
            image.append(next(rest))
        yield image


def _resize(scores: Tensor, old: Grid, new: Grid) -> Tensor:
    """Scores of one grid's tokens, ``[n]``, in another grid: what it received is spread over as many tokens as there are."""
    if old == new:
        return scores
    grid = interpolate(scores.view(1, 1, *old), size=new, mode="bilinear", antialias=True)
    return grid.flatten() * (_cells(old) / _cells(new))
