"""What a policy may answer besides a bare index: a Reduction, which changes tokens, or a Ranking, a choice said as data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from vlmprune import ops
from vlmprune.compensation.interface import Caption
from vlmprune.constants import whole_numbers
from vlmprune.ops.selection import Selection
from vlmprune.policies.inputs import Rating

if TYPE_CHECKING:
    from vlmprune.policies.base import TokenContext

Counts = tuple[int, ...]


Positions = Literal["pack", "keep"]
"""Where the kept rows stand for RoPE: at 0, 1, 2, ... without gaps, or at the positions they had."""


@dataclass(frozen=True, eq=False)
class Insertion:
    """Texts that join the prompts, each in the places of as many tokens that the same choice drops.

    Attributes:
        before: per sample, the positions in the prompt chunk of the tokens, dropped or not, in front of which they go,
            ascending.
        sizes: per sample, how many rows each of them has.
        hidden: ``[B, C, D]`` the rows, those of a sample's texts one after the other, then padding.
        captions: per sample, what they say, and what writing it cost.
        seconds: how long all of it took to write.
    """

    before: tuple[Counts, ...]
    sizes: tuple[Counts, ...]
    hidden: Tensor
    captions: tuple[tuple[Caption, ...], ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True)
class Reduction:
    """A choice that also changes the tokens: rows merged or made anew, another order, other positions.

    Attributes:
        index: ``[B, K]`` int64 whose places among the entering tokens are used, each once, -1 on the right. The rows
            stand in this order where the image stood; a merged token may so follow the kept ones.
        hidden: ``[B, K, D]`` the rows' new hidden states, or None to keep theirs.
        positions: "keep" the rotary positions of the places used, or "pack" all rows to 0, 1, 2, ... without gaps.
        inserted: texts that join the prompts; kept positions then move up behind them, as if they had been typed there.
        merged: ``[B, N]`` int64 the number of the entering token, one in ``index``, in whose place each was merged; -1 = in
            none. With ``rectify=True`` that one stands for it; for what is in none, and without, the most similar does.
    """

    index: Tensor
    hidden: Tensor | None = None
    positions: Positions = "keep"
    inserted: Insertion | None = None
    merged: Tensor | None = None


def outcome(index: Tensor, positions: Positions, hidden: Tensor | None = None) -> Tensor | Reduction:
    """A bare index where tokens are only dropped and keep their positions, else a Reduction.

    Example:
        >>> outcome(torch.tensor([[0, 2]]), "keep")
        tensor([[0, 2]])
    """
    return index if hidden is None and positions == "keep" else Reduction(index, hidden, positions)


@dataclass(eq=False)  # nobody writes to one; frozen, it would take longer to make
class Ranking:
    """The best of the entering tokens: scores, how many stay, and which stay or go whatever their score.

    ``PruningPolicy.rank`` returns it. The runner hands it to one fused op together with everything that gets shorter;
    ``index`` is the same choice alone.

    Attributes:
        scores: ``[B, N]`` float, the higher survives, ties go to the lower number and NaN ranks below everything; or a
            ``Rating``, the attention that they are to be made of.
        keep: how many tokens of each sample stay, at most as many as it has; with ``images`` of each image.
        images: per sample, the tokens of each of its images, where every image keeps its own; None = all together.
        code: ``[B, N]`` int8: 0 = competes, 1 = stays beyond ``keep``, 2 = goes, 3 = competes and stays in any case; None =
            all compete.
        extra: how many tokens of each sample can stay beyond ``keep`` because of their code, at most; None = none.
        positions: "keep" their rotary positions, or "pack" all rows to 0, 1, 2, ... without gaps.
        static: whether all of this is the same for prompts of the same counts, grids and shapes, but for the attention that a
            ``Rating`` reads: such a prompt is then pruned without asking the policy again.
        again: where ``scores`` say what a choice of another kind has found (by crop): that choice made anew with the tokens
            ``[B, N]`` bool behind all others; None = scores are what tokens compete by.
    """

    scores: Tensor | Rating
    keep: Counts | tuple[Counts, ...]
    images: tuple[Counts, ...] | None = None
    code: Tensor | None = None
    extra: Counts | None = None
    positions: Positions = "keep"
    static: bool = False
    again: Callable[[Tensor], Ranking] | None = None

    @property
    def least(self) -> Counts:
        """Per sample, how many tokens stay by their score."""
        return self.keep if self.images is None else tuple(map(sum, self.keep))  # type: ignore[arg-type, return-value]

    def most(self, counts: Sequence[int]) -> Counts:
        """Per sample of so many tokens, how many can stay: exactly so many do, where there is no ``extra``."""
        if self.extra is None:
            return self.least
        extra = self.extra
        return tuple(min(n, k + more) for n, k, more in zip(counts, self.least, extra, strict=True))

    def keeps_all(self, counts: Counts) -> bool:
        """Whether all of so many tokens stay, and where they are."""
        drops = self.code is not None and self.extra is None
        return self.positions == "keep" and self.least == counts and not drops

    def selection(
        self, most: Counts, device: torch.device, width: int, newest: bool = False, left: bool = False
    ) -> Selection:
        """How ``ops.prune_tokens`` chooses.

        Args:
            most: how many can stay of each sample.
            device: where the lists go that it takes.
            width: rows of what it returns.
            newest: whether the newest token, if it is visual, comes before all others.
            left: whether shorter samples are padded on the left.
        """
        keep, images, quota, segments = self.keep, self.images, None, None
        if images is not None and any(len(sizes) > 1 for sizes in images):
            quota, segments = whole_numbers(keep, device), whole_numbers(images, device)
        else:
            keep = self.least
            if not keep or keep.count(keep[0]) < len(keep):
                quota = whole_numbers(keep, device)
        each = keep[0] if quota is None else 0
        return Selection(each, width, max(most, default=0), quota, self.code, segments, newest, left)  # type: ignore[arg-type]

    def scored(self) -> Tensor:
        """The scores ``[B, N]`` float32."""
        return self.scores.scores() if isinstance(self.scores, Rating) else self.scores.float()

    def ahead(self, first: Tensor) -> Ranking:
        """The same with the tokens ``first [B, N]`` before all others."""
        return replace(self, scores=self.scored().masked_fill(first, float("inf")))

    def behind(self, last: Tensor) -> Ranking:
        """The same with the tokens ``last [B, N]`` behind all others that they compete with."""
        if self.again is not None:
            return self.again(last)
        return replace(self, scores=self.scored().masked_fill(last, float("-inf")), static=False)

    def index(self, ctx: TokenContext) -> Tensor:
        """Numbers ``[B, K]`` of the tokens that stay, ascending, -1 on the right; with ``extra`` one host read."""
        counts, scores = ctx.counts, self.scored()
        mask = None if all(n == scores.shape[1] for n in counts) else ctx.mask
        how = self.selection(self.most(counts), scores.device, scores.shape[1])
        out = ops.prune_scored(scores, [], key_mask=mask, **how.keywords())
        return out.kept if self.extra is None else out.kept[:, : int(out.count.max())]
