"""Attention masks of shortened sequences, in the format of whatever attention implementation a model has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function

from vlmprune.errors import ModelError
from vlmprune.models.host.cache_layers import Length, PrunedLayer, lengthen
from vlmprune.register import NAME

ADDS = ("sdpa", "eager", NAME)
"""Implementations whose masks may be numbers that are added to the logits."""


def check_shows(config: Any) -> None:
    """Raise ModelError for an attention implementation that cannot be told which keys each row sees."""
    if config._attn_implementation not in ADDS:
        raise ModelError(
            f"attn_implementation: expected {', '.join(map(repr, ADDS[:-1]))} or {ADDS[-1]!r} with a second wave (others know "
            f"no mask but the causal one), got {config._attn_implementation!r}"
        )


def check_adds(config: Any) -> None:
    """Raise ModelError for an attention implementation that cannot give some keys more weight than others."""
    if config._attn_implementation not in ADDS:
        raise ModelError(
            f"attn_implementation: expected {', '.join(map(repr, ADDS[:-1]))} or {ADDS[-1]!r} with rectify=True (others add "
            f"nothing to the logits of single keys), got {config._attn_implementation!r}"
        )


def pruned_mask(
    config: Any,
    hidden: Tensor,
    valid: Tensor | None,
    past: Length,
    layer: PrunedLayer | None,
    left: bool = False,
    bias: Tensor | None = None,
    shown: Tensor | None = None,
) -> Any:
    """The causal mask in the format of the attention implementation (None where it needs none).

    Args:
        config: the text model's configuration, which names the implementation.
        hidden: ``[B, n, D]`` rows entering the layer.
        valid: bool ``[B, P]`` for the first keys, those after them are valid; None = all are.
        past: entries the cache layer holds already.
        layer: the cache layer, or None without a cache.
        left: every sample's padding among the rows is known to stand on their left, as a stage leaves it.
        bias: float32 ``[B, P]`` what is added to the logits of the first keys, 0 to those of the others; None = nothing.
        shown: bool ``[B, n, P]`` which of the first keys each row sees, where that is no causal mask (``valid`` then says
            nothing); those after them it does not see.

    Raises:
        ModelError: a bias, and an implementation that has no place for it.
    """
    batch, rows = hidden.shape[:2]
    build = ALL_MASK_ATTENTION_FUNCTIONS.get(config._attn_implementation)
    if build is None:  # as transformers has it for implementations without a mask function
        return None
    if bias is not None:
        check_adds(config)
    plain, static = bias is None, layer is not None and layer.static
    valid = None if valid is None else valid.to(hidden.device)
    length, keys, show = _keys(hidden, valid, past, layer, shown)
    mask = build(
        batch_size=batch,
        q_length=rows,
        kv_length=length,
        q_offset=past if shown is None else 0,
        kv_offset=0,
        mask_function=show,
        attention_mask=keys,
        # Leaving the mask out is only asked for where no value has to be read from the device to decide it.
        allow_is_causal_skip=plain and shown is None and valid is None and not (static and rows == 1),
        dtype=hidden.dtype,
        config=config,
        use_vmap=False,
        device=hidden.device,
        **({"left_padded": True} if plain and left and config._attn_implementation == NAME else {}),
    )
    return mask if bias is None else _added(mask, bias, hidden)


def _keys(
    hidden: Tensor, valid: Tensor | None, past: Length, layer: PrunedLayer | None, shown: Tensor | None
) -> tuple[Length, Tensor | None, Callable[..., Any]]:
    """How many keys a mask has, which of them are no padding, and which of those each row sees."""
    rows = hidden.shape[1]
    if shown is None:
        length = past + rows if layer is None else layer.get_mask_sizes(rows)[0]
        return length, valid if layer is None else layer.key_mask(valid, past, hidden), causal_mask_function
    width = layer.get_mask_sizes(rows)[0] if layer is not None and layer.static else shown.shape[2]
    return width, None, _showing(shown.to(hidden.device), width)


def _showing(shown: Tensor, length: int) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """``shown [B, n, P]`` as transformers asks for a mask of ``length`` keys: by sample, head, row and key."""
    known = pad(shown, (0, length - shown.shape[2]), value=False)
    return lambda sample, head, row, key: known[sample, row, key]


def _added(mask: Tensor, bias: Tensor, hidden: Tensor) -> Tensor:
    """``bias [B, P]`` where a mask ``[B, 1, n, S]``, bool or to be added, shows a key; in the dtype of the rows."""
    more = lengthen(bias.to(hidden.device, hidden.dtype), mask.shape[-1], 0.0)[:, None, None]
    seen = mask if mask.dtype == torch.bool else mask == 0
    return torch.where(seen, more, torch.finfo(hidden.dtype).min)
