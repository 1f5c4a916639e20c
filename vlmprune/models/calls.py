"""What one call of a vision-language model brings: images, visual tokens, padding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmprune.errors import check
from vlmprune.models.family import Parts
from vlmprune.policies.base import Grid


def image_token_count(kwargs: dict[str, Any], grid: Grid) -> int | None:
    """Visual tokens the call brings in all, read off shapes on the host; None if it brings no images.

    Before transformers 5.18 the base model gets pixels; since then generate() encodes them first and passes features.
    A placeholder token without images (one that the model itself generated, say) is ordinary text.
    """
    encoded = (kwargs.get("mm_encoder_outputs") or {}).get("image")
    if encoded is not None:
        return sum(features.shape[0] for features in encoded.pooler_output) or None
    pixels = kwargs.get("pixel_values")
    return None if pixels is None else pixels.shape[0] * grid[0] * grid[1]


def visual_mask(parts: Parts, ids: Tensor | None, embeds: Tensor | None) -> Tensor:
    """``[B, q]`` True at visual tokens; found as the base model finds them, by id or by the placeholder's embedding."""
    if ids is not None:
        return ids == parts.image_token_id
    assert embeds is not None
    token = torch.tensor(parts.image_token_id, device=embeds.device)
    return (embeds == parts.model.get_input_embeddings()(token)).all(-1)


def padding_mask(attention_mask: object) -> Tensor | None:
    """The 2-D attention mask as bool ``[B, S]``; None if there is none. Raises ValueError for a ready-made 4-D mask."""
    if attention_mask is None:
        return None
    ok = isinstance(attention_mask, Tensor) and attention_mask.ndim == 2
    got = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
    check(ok, "attention_mask", "2-D [B, S] (a ready-made mask cannot be shortened)", got)
    assert isinstance(attention_mask, Tensor)
    return attention_mask.bool()
