"""The model side: images are encoded as they are, and of each image's visual tokens the kept ones are handed on."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from vlmprune.errors import check
from vlmprune.integrations.vllm.choice import context_of, kept_rows
from vlmprune.integrations.vllm.settings import KEPT, Settings
from vlmprune.integrations.vllm.tower import TowerReads
from vlmprune.models.host.views import Encoded, ImageViews, Shapes, crop_grid


class PrunedImages:
    """Stands before a model of vLLM. Whatever else is encoded in the same call, an image is pruned as if it were alone."""

    config: Any
    attention = "self_attn"
    """What a block of the tower calls its attention."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self.pruning = Settings.of(self.config)
        blocks, projector = self.vision_parts()
        layers = self.pruning.policy.needs(0).vision
        self.reads = TowerReads(self.config, blocks, self.attention, projector, layers)

    def vision_parts(self) -> tuple[Sequence[Any], Any]:
        """The tower's blocks, and the projector."""
        raise NotImplementedError

    def noted(self, note: Encoded, kwargs: dict[str, Any]) -> list[int]:
        """Add to a note what a call says of its images; returns the first crop, or packed patch, of each."""
        raise NotImplementedError

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """The kept visual tokens ``[kept, W]`` of every image; W is wider than the language model where more comes along.

        Videos are encoded whole.
        """
        if KEPT not in kwargs:  # vLLM encodes images and videos in calls of their own
            check("pixel_values" not in kwargs, KEPT, "the count of every image", "none")
            return super().embed_multimodal(**kwargs)  # type: ignore[misc]
        asked = kwargs.pop(KEPT)
        with self.reads.noting() as note:
            encoded = super().embed_multimodal(**kwargs)  # type: ignore[misc]
        firsts = self.noted(note, kwargs)
        shapes = Shapes(self.config, self.reads.encoder.family.side(self.config))
        images = self.reads.encoder.family.images(shapes, [*encoded], note)
        kept = torch.as_tensor(asked).flatten().tolist()
        return [
            self._pruned(embeds, k, image, note, first, i)
            for i, (embeds, k, image, first) in enumerate(zip(encoded, kept, images, firsts, strict=True))
        ]

    def _pruned(
        self, embeds: Tensor, kept: int, image: ImageViews, note: Encoded, first: int, i: int
    ) -> Tensor:
        """The kept rows of the ``i``-th image of a call."""
        seen: dict[str, Any] = {}
        if self.pruning.policy.needs(0).vision:
            own = self.reads.alone(note, first, image, None if note.thw is None else note.thw[i])
            seen = self.reads.fields(own, image)
        tiles = self.reads.encoder.family.tiles
        rows = embeds[:, : self.config.text_config.hidden_size]
        ctx = context_of(rows, image, crop_grid(self.config) if tiles else None, seen)
        return kept_rows(self.pruning.policy_for(len(embeds), kept), ctx, embeds, kept)


def starts(sizes: Sequence[int]) -> list[int]:
    """Where each of several things begins, laid one behind the other.

    Example:
        >>> starts([3, 1, 2])
        [0, 3, 4]
    """
    return [*accumulate(sizes, initial=0)][:-1]
