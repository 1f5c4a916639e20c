"""The model side: images are encoded as they are, and of each image's visual tokens the kept ones are handed on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor

from vlmprune.errors import check
from vlmprune.integrations.vllm.choice import context_of, kept_rows
from vlmprune.integrations.vllm.settings import KEPT, Settings
from vlmprune.integrations.vllm.tower import TowerReads
from vlmprune.models.host.families import token_grid
from vlmprune.models.host.views import Encoded, ImageViews, Shapes, crop_grid
from vlmprune.policies.base import tokens_in


class PrunedImages:
    """Stands before a model of vLLM. Whatever else is encoded in the same call, an image is pruned as if it were alone."""

    config: Any
    attention = "self_attn"
    """What a block of the tower calls its attention."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self.pruning = Settings.of(self.config)
        blocks, projector = self.vision_parts()
        needs = self.pruning.policy.needs(0)
        self.reads = TowerReads(self.config, blocks, self.attention, projector, needs.vision, needs.values)
        self.at_once: int = vllm_config.scheduler_config.max_num_batched_tokens

    def vision_parts(self) -> tuple[Sequence[Any], Any]:
        """The tower's blocks, and the projector."""
        raise NotImplementedError

    def sizes(self, kwargs: dict[str, Any]) -> list[int]:
        """How many crops, or packed patches, each image of a call has."""
        raise NotImplementedError

    def describe(self, note: Encoded, kwargs: dict[str, Any]) -> None:
        """Add to a note what a call says of the shapes of its images."""

    def cut(self, kwargs: dict[str, Any], first: int, last: int) -> dict[str, Any]:
        """A call of the images ``first`` to ``last - 1`` alone."""
        return {name: value[first:last] for name, value in kwargs.items()}

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """The kept visual tokens ``[kept, W]`` of every image; W is wider than the language model where more comes along.

        Videos are encoded whole.
        """
        if KEPT not in kwargs:  # vLLM encodes images and videos in calls of their own
            check("pixel_values" not in kwargs, KEPT, "the count of every image", "none")
            return super().embed_multimodal(**kwargs)  # type: ignore[misc]
        return [*chain.from_iterable(map(self._encoded, self._portions(kwargs)))]

    def _portions(self, kwargs: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """A call cut up as unpruned: vLLM counts what stays, so more images would meet in the tower than it has memory for."""
        family, first, load = self.reads.encoder.family, 0, 0
        per_crop = tokens_in([token_grid(self.config)]) if family.packs else 1 / family.side(self.config) ** 2
        sizes = self.sizes(kwargs)
        for last, size in enumerate(sizes):
            tokens = round(size * per_crop)
            if load and load + tokens > self.at_once:
                yield self.cut(kwargs, first, last)
                first, load = last, 0
            load += tokens
        yield self.cut(kwargs, first, len(sizes))

    def _encoded(self, kwargs: dict[str, Any]) -> list[Tensor]:
        """What stays of the images of one run of the tower."""
        kept = torch.as_tensor(kwargs.pop(KEPT)).flatten().tolist()
        with self.reads.noting() as note:
            encoded = super().embed_multimodal(**kwargs)  # type: ignore[misc]
        self.describe(note, kwargs)
        shapes = Shapes(self.config, self.reads.encoder.family.side(self.config))
        images = self.reads.encoder.family.images(shapes, [*encoded], note)
        firsts = starts(self.sizes(kwargs))
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
