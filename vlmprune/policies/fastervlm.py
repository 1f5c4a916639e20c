"""FasterVLM: keep the patches that the vision tower's CLS token attends to most."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vlmprune import ops
from vlmprune.policies.base import Needs, PruningPolicy, Reduction, TokenContext, check_keep
from vlmprune.policies.vision import (
    Positions,
    check_positions,
    check_whole,
    images_of,
    outcome,
    patch_attention,
    quota_of,
    vision_of,
)


@dataclass(frozen=True)
class FasterVLM(PruningPolicy):
    """Keeps the patches with the most CLS attention, head mean, in every image; drops the rest before the language model.

    A tower without CLS is scored by the mean attention a patch receives from all patches (not in the paper).

    Args:
        keep: tokens per image (int; published budgets 192, 128, 64) or share (float; the paper's 1 - reduction ratio).
        vision_layer: vision-tower layer whose attention is read; -2 is the one whose output LLaVA projects.
        positions: ``"pack"`` (released code: the kept tokens stand at 0, 1, 2, ...) or ``"keep"`` their own.

    Raises:
        ValueError: a setting is out of range.
    """

    summary: ClassVar[str] = "patches most attended by the vision tower's CLS"
    paper: ClassVar[str] = (
        "[CLS] Attention is All You Need for Training-Free Visual Token Pruning, arXiv 2412.01818v1"
    )
    presets: ClassVar[Mapping[int, str]] = {192: "keep=192", 128: "keep=128", 64: "keep=64"}
    checked: ClassVar[str] = "formula"

    keep: int | float = 64
    vision_layer: int = -2
    positions: Positions = "pack"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_whole("vision_layer", self.vision_layer)
        check_positions(self.positions)

    @property
    def layers(self) -> tuple[int, ...]:
        """Before the language model."""
        return (0,)

    def needs(self, layer: int) -> Needs:
        """Query and key of the vision layer."""
        return Needs(vision=(self.vision_layer,))

    def select(self, ctx: TokenContext) -> Tensor | Reduction:
        """The best-scored patches of each image."""
        images = images_of(ctx)
        if not images.tokens:
            return ctx.ordinals
        kept = quota_of(images, self.keep)
        scores = patch_attention(vision_of(ctx, self.vision_layer, images))
        best, _ = ops.select_topk(scores, kept)
        index = images.index(best, [kept] * len(images.tokens), len(ctx.counts))
        return outcome(index, self.positions)
