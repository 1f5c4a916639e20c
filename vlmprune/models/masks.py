"""The attention mask of a pruned layer, built by transformers' own mask functions for this layer's cache length."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask


def pruned_mask(
    config: Any, hidden: Tensor, valid: Tensor | None, cache: Cache | None, dropped: int, i: int
) -> Any:
    """The mask decoder layer ``i`` needs now, in its attention implementation's format (None where it needs none).

    Args:
        config: the text model's configuration (it names the attention implementation).
        hidden: ``[B, n, D]`` rows entering the layer.
        valid: ``[B, stored + n]`` False at padding, or None.
        cache: the KV cache, or None.
        dropped: tokens this layer's cache has seen but does not hold.
        i: index of the decoder layer.
    """
    if valid is not None:
        valid = F.pad(valid, (dropped, 0))  # the mask functions index keys by tokens seen, not stored
    return create_causal_mask(
        config=config,
        inputs_embeds=hidden,
        attention_mask=valid,
        past_key_values=cache,
        position_ids=None,
        layer_idx=i,
    )
