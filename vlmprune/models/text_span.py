"""Where the text after the last image is, for methods whose question rates the tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmprune.models.layout import Layout, where_true


@dataclass(frozen=True)
class TextSpan:
    """The text after the last image: ``mask [B, q]`` in the unpruned prompt, how many tokens it has in each sample, and how
    far from the prompt's end the farthest of it lies."""

    mask: Tensor
    words: tuple[int, ...]
    reach: int


def find_text(visual: Tensor, prompt: Tensor | None) -> TextSpan:
    """Find the text after each sample's last image. Its extent is data: one host read."""
    q = visual.shape[1]
    order = torch.arange(q, device=visual.device)
    last_visual = torch.where(visual, order, -1).amax(1, keepdim=True)
    mask = (order > last_visual) & (last_visual >= 0)
    if prompt is not None:
        mask = mask & prompt
    words, reach = torch.stack([mask.sum(1), torch.where(mask, q - order, 0).amax(1)]).tolist()
    return TextSpan(mask, tuple(words), max(reach))


def text_rows(layout: Layout, text: TextSpan) -> Tensor:
    """``[B, T]`` the rows of the text after the last image in a layout, -1 = padding."""
    mask = text.mask.to(layout.visual.device)
    if layout.origin is not None:
        mask = (layout.origin >= 0) & mask.gather(1, layout.origin.clamp(min=0))
    return where_true(mask, max(text.words))
