"""Prompts of random pictures and words of a model's own sizes, and the same with a smaller picture."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vlmprune.errors import check
from vlmprune.models import find_parts
from vlmprune.policies.base import Grid
from vlmprune.testing.pictures import keeps_shape, make_inputs

BEFORE, AFTER = 35, 29  # text tokens around the image in LLaVA-1.5's prompt
GRID = (32, 32)  # of an image that may have any shape, where none is given: 1,024 visual tokens


@dataclass(frozen=True)
class Prompt:
    """One sample: text, images one behind the other, text.

    Attributes:
        images: how many.
        grid: rows and columns of visual tokens of each, where the model takes images of any shape.
    """

    images: int = 1
    grid: Grid = GRID

    def inputs(self, config: Any, batch: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """The model's inputs for ``batch`` such samples, all alike, on the device; pixels in ``dtype``."""
        picture = self.grid if keeps_shape(config) else "square"
        # One token of text stands before whatever is asked for.
        one, _ = make_inputs(config, [(BEFORE - 1, *[picture] * self.images, AFTER)])
        placed = {k: v.to(device, dtype if v.is_floating_point() else None) for k, v in one.items()}
        return {k: v.repeat(batch, *(1,) * (v.ndim - 1)) for k, v in placed.items()}


@dataclass(frozen=True)
class Smaller:
    """The same prompt with smaller images.

    Attributes:
        prompt: what to ask.
        side: pixels along each side of an image, where the tower takes one size; None where it takes any.
    """

    prompt: Prompt
    side: int | None = None

    @contextmanager
    def tower(self, model: Any) -> Iterator[None]:
        """Let the vision tower take images of that size inside the block."""
        if self.side is None:
            yield
            return
        vision, config = find_parts(model).vision, model.config.vision_config
        (embeddings,) = (m for m in vision.modules() if hasattr(m, "position_embedding"))
        table, ids, size = embeddings.position_embedding, embeddings.position_ids, embeddings.image_size
        count = (self.side // config.patch_size) ** 2 + 1  # CLIP's class token has a position, too
        embeddings.position_embedding = nn.Embedding(count, table.embedding_dim, _weight=table.weight[:count])
        embeddings.position_ids, embeddings.image_size = ids[:, :count], self.side
        config.image_size = self.side
        try:
            yield
        finally:
            embeddings.position_embedding, embeddings.position_ids = table, ids
            embeddings.image_size = config.image_size = size


def why_not_smaller(config: Any, random: bool) -> str | None:
    """Why no image of fewer visual tokens can be made for a model of these or of ``random`` weights; None if one can."""
    if keeps_shape(config) or (random and config.vision_config.model_type == "clip_vision_model"):
        return None
    return f"the image size of a {config.model_type} checkpoint is fixed: its tower has one position a patch"


def smaller(config: Any, prompt: Prompt, tokens: int) -> Smaller:
    """The prompt with images of about ``tokens`` visual tokens together: a square, or as near to one as can be.

    Raises:
        InputError: fewer tokens than images.
    """
    check(tokens >= prompt.images, "tokens", f"at least {prompt.images}, one per image", tokens)
    each = tokens / prompt.images
    rows = round(each**0.5)
    if keeps_shape(config):
        return Smaller(replace(prompt, grid=(rows, round(each / rows))))
    return Smaller(prompt, side=rows * config.vision_config.patch_size)
