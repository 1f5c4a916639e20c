"""The attention backend ``attn_implementation="vlmprune"``: SDPA's results, from a kernel that keeps the log-sum-exp.

Masks have SDPA's format, so every model that runs with sdpa runs with this. Where a stage scores from a layer's attention,
the log-sum-exp of its rows is kept for it; scoring without one (masked on a GPU, dropout, other devices) computes its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from vlmprune.errors import check
from vlmprune.models.attention import kernels
from vlmprune.register import NAME

SPECIAL = ("position_bias", "cache")
"""Arguments that transformers' own SDPA function knows how to treat."""


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    vlmprune: Any = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers' AttentionInterface asks for it.

    Args:
        module: the attention module; its ``is_causal`` counts where the argument is None.
        query: ``[B, H, Sq, D]`` after RoPE.
        key, value: ``[B, Hkv, S, D]``.
        attention_mask: from ``mask``, or any that SDPA takes; None = causal if the module is and Sq > 1, else all seen.
        dropout, scaling: probability and softmax scale; None = ``D ** -0.5``.
        is_causal: overrules the module.
        vlmprune: the running call in a pruning scope.
        softcap, s_aux: settings of a few models that change the softmax; SDPA would leave the second out without a word.
        **kwargs: anything else, for transformers' own SDPA function.

    Returns:
        ``[B, Sq, H, D]``, and None where eager attention returns its weights.

    Raises:
        ValueError: the model changes the softmax itself (soft capping, attention sinks).
    """
    for name, setting in (("softcap", softcap), ("s_aux", s_aux)):
        check(setting is None, name, f"None with attn_implementation={NAME!r}", "a value")
    want_lse = vlmprune is not None and vlmprune.scores_from(module)
    special = any(name in kwargs and kwargs[name] is not None for name in SPECIAL)
    causal, rows, keys, values = is_causal, query.shape[2], key, value
    if causal is None:  # as transformers' own functions have it: modules that say nothing are causal
        causal = bool(module.is_causal) if hasattr(module, "is_causal") else True
    causal = causal and rows > 1
    if attention_mask is not None and attention_mask.ndim == 1:  # only a causal mask becomes sequence bounds
        causal = True
    # From position 0 on: behind these rows a preallocated cache may hold keys that are not there yet.
    if attention_mask is None and causal:
        keys, values = key[:, :, :rows], value[:, :, :rows]
    call = kernels.AttentionCall(query, keys, values, attention_mask, causal, scaling, dropout)
    done = None if special else kernels.attend(call, want_lse)
    if done is None:
        dense = kernels.bounds_mask(call) if call.packed else attention_mask
        return sdpa_attention_forward(module, query, key, value, dense, dropout, scaling, is_causal, **kwargs)
    out, lse = done
    if want_lse and lse is not None:
        vlmprune.lse[module.layer_idx] = lse.detach()
    return out.contiguous(), None


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    left_padded: bool = False,
    allow_is_causal_skip: bool = True,
    dtype: torch.dtype = torch.float32,
    **kwargs: Any,
) -> Tensor | None:
    """The mask as transformers' AttentionMaskInterface asks for it; ``left_padded`` is what only our wiring knows.

    Returns:
        None where causality alone decides; bool ``[B, 1, Sq, S]``, True = seen; or, for a whole padded prompt on a
        GPU with a flash kernel, its sequence bounds (``kernels.bounds``).
    """
    whole = q_length == kv_length and mask_function is causal_mask_function and attention_mask is not None
    fresh = isinstance(q_offset, int) and q_offset == 0 and kv_offset == 0
    ask = allow_is_causal_skip and not torch.compiler.is_compiling()
    if whole and fresh and (ask or left_padded):
        assert attention_mask is not None
        if kernels.takes_bounds(attention_mask.device, dtype):
            valid = attention_mask[:, -kv_length:].bool()
            if left_padded:  # nothing to ask the device for
                return kernels.bounds(valid)
            starts = valid[:, 0].int() + (valid[:, 1:] & ~valid[:, :-1]).sum(1)
            # one read, as SDPA's mask
            full, in_one_run = torch.stack([valid.all(), (starts <= 1).all()]).tolist()
            if full or in_one_run:
                return None if full else kernels.bounds(valid)
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip,
        dtype=dtype,
        **kwargs,
    )


def explain(device: torch.device | str | None = None) -> list[tuple[str, str | None]]:
    """Every kernel in the order of preference, with the reason why it cannot run on a device or what it refused there, or None.

    Args:
        device: where; None = the current GPU if there is one, else the CPU.
    """
    if device is None:
        device = kernels.GPU if torch.cuda.is_available() else "cpu"
    where = torch.device(device)
    return [*((kernel.name, kernel.explain(where)) for kernel in kernels.KERNELS), ("torch sdpa", None)]


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask)
