"""Attention masks of shortened sequences, in the format of whatever attention implementation a model has."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function

from vlmprune.models.host.cache_layers import Length, PrunedLayer
from vlmprune.register import NAME


def pruned_mask(
    config: Any,
    hidden: Tensor,
    valid: Tensor | None,
    past: Length,
    layer: PrunedLayer | None,
    left: bool = False,
) -> Any:
    """The causal mask in the format of the attention implementation (None where it needs none).

    Args:
        config: the text model's configuration, which names the implementation.
        hidden: ``[B, n, D]`` rows entering the layer.
        valid: bool ``[B, P]`` for the first keys, those after them are valid; None = all are.
        past: entries the cache layer holds already.
        layer: the cache layer, or None without a cache.
        left: every sample's padding among the rows is known to stand on their left, as a stage leaves it.
    """
    batch, rows = hidden.shape[:2]
    build = ALL_MASK_ATTENTION_FUNCTIONS.get(config._attn_implementation)
    if build is None:  # as transformers has it for implementations without a mask function
        return None
    static = layer is not None and layer.static
    valid = None if valid is None else valid.to(hidden.device)
    return build(
        batch_size=batch,
        q_length=rows,
        kv_length=rows if layer is None else layer.get_mask_sizes(rows)[0],
        q_offset=past,
        kv_offset=0,
        mask_function=causal_mask_function,
        attention_mask=valid if layer is None else layer.key_mask(valid, past, hidden),
        # Leaving the mask out is only asked for where no value has to be read from the device to decide it.
        allow_is_causal_skip=valid is None and not (static and rows == 1),
        dtype=hidden.dtype,
        config=config,
        use_vmap=False,
        device=hidden.device,
        **({"left_padded": True} if left and config._attn_implementation == NAME else {}),
    )
