"""A stand-in for the flash-attn packages in plain PyTorch: their signatures, their layouts, their lower-right causality."""

from __future__ import annotations

import functools
import math
import sys
from types import ModuleType

import torch


def attend(q, k, v, scale, causal):
    """``q [B, Sq, H, D]``, ``k, v [B, S, Hkv, D]`` -> output ``[B, Sq, H, D]`` and log-sum-exp ``[B, H, Sq]``."""
    groups, (n, total) = q.shape[2] // k.shape[2], (q.shape[1], k.shape[1])
    k, v = (x.repeat_interleave(groups, 2) for x in (k, v))
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k).float() * (scale or q.shape[-1] ** -0.5)
    if causal:
        seen = torch.ones(n, total, dtype=torch.bool).tril(total - n)
        logits = logits.masked_fill(~seen, -math.inf)
    lse = logits.logsumexp(-1)
    p = logits.softmax(-1).nan_to_num(0.0)
    return torch.einsum("bhqk,bkhd->bqhd", p.to(v.dtype), v), lse


def attend_packed(q, k, v, cu_q, cu_k, most_q, most_k, scale, causal):
    """The same for sequences one behind the other: ``[T, H, D]`` -> ``[T, H, D]`` and ``[H, T]``."""
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert cu_q.diff().max() <= most_q and cu_k.diff().max() <= most_k
    assert cu_q[-1] == q.shape[0] and cu_k[-1] == k.shape[0]
    parts = []
    for a, b, c, d in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True):
        parts.append(attend(q[None, a:b], k[None, c:d], v[None, c:d], scale, causal))
    return torch.cat([out[0] for out, _ in parts]), torch.cat([lse[0] for _, lse in parts], 1)


def generation_2(calls):
    def flash_attn_func(
        q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, return_attn_probs=False, **more
    ):
        calls.append("dense")
        out, lse = attend(q, k, v, softmax_scale, causal)
        return (out, lse, None) if return_attn_probs else out

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p=0.0, softmax_scale=None, causal=False, return_attn_probs=False, **more,
    ):  # fmt: skip
        calls.append("packed")
        ends = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        out, lse = attend_packed(q, k, v, *ends, softmax_scale, causal)
        return (out, lse, None) if return_attn_probs else out

    return flash_attn_func, flash_attn_varlen_func


def generation_3(calls):
    def flash_attn_func(q, k, v, softmax_scale=None, causal=False, return_attn_probs=False):
        calls.append("dense")
        out, lse = attend(q, k, v, softmax_scale, causal)
        return (out, lse) if return_attn_probs else out

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        seqused_q=None, softmax_scale=None, causal=False, return_attn_probs=False,
    ):  # fmt: skip
        calls.append("packed")
        ends = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        out, lse = attend_packed(q, k, v, *ends, softmax_scale, causal)
        return (out, lse) if return_attn_probs else out

    return flash_attn_func, flash_attn_varlen_func


def generation_4(calls):
    def flash_attn_func(q, k, v, qv=None, softmax_scale=None, causal=False, return_lse=False):
        calls.append("dense")
        out, lse = attend(q, k, v, softmax_scale, causal)
        return out, lse if return_lse else None

    def flash_attn_varlen_func(
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
        softmax_scale=None, causal=False, return_lse=False,
    ):  # fmt: skip
        calls.append("packed")
        ends = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        out, lse = attend_packed(q, k, v, *ends, softmax_scale, causal)
        return out, lse if return_lse else None

    return flash_attn_func, flash_attn_varlen_func


GENERATIONS = {
    2: ("flash_attn", generation_2),
    3: ("flash_attn_interface", generation_3),
    4: ("flash_attn.cute", generation_4),
}


def install(monkeypatch, generation, takes=None):
    """Put one generation's stand-in where Python finds modules, beside others; returns the list its calls are noted in.

    ``takes``: its head dims; it refuses others in the words of its generation.
    """
    name, make = GENERATIONS[generation]
    calls = []
    for part in {name.partition(".")[0], name} - sys.modules.keys():
        monkeypatch.setitem(sys.modules, part, ModuleType(part))
    module = sys.modules[name]
    functions = make(calls)
    if takes is not None:
        functions = [refusing(function, takes, generation, calls) for function in functions]
    module.flash_attn_func, module.flash_attn_varlen_func = functions
    return calls


def refusing(function, takes, generation, calls):
    """The function, for some head dims only: the fourth generation asserts, the others check in C++."""

    @functools.wraps(function)
    def call(q, *args, **kwargs):
        size = q.shape[-1]
        if size not in takes:
            calls.append("refused")
        if generation == 4:
            assert size in takes, f"(head_dim, head_dim_v)=({size}, {size}) is not supported on SM90.\nMore."
        elif size not in takes:
            raise RuntimeError(
                "This flash attention build does not support hdim 64.\nException raised from run"
            )
        return function(q, *args, **kwargs)

    return call


def raising(error):
    """A function of the third generation's signature that raises."""

    def flash_attn_func(q, k, v, softmax_scale=None, causal=False, return_attn_probs=False):
        raise error

    return flash_attn_func


def install_for_transformers(monkeypatch):
    """Generation 2 as transformers' own flash_attention_2 imports it; returns the list of its calls."""
    import transformers.modeling_flash_attention_utils as utils

    calls = install(monkeypatch, 2)
    module = sys.modules["flash_attn"]
    module.flash_attn_with_kvcache = None
    padding = ModuleType("flash_attn.bert_padding")
    padding.pad_input, padding.unpad_input = utils._pad_input, utils._unpad_input
    monkeypatch.setitem(sys.modules, "flash_attn.bert_padding", padding)
    monkeypatch.setattr(utils, "is_flash_attn_2_available", lambda *args, **kwargs: True)
    monkeypatch.setattr(
        utils, "_loaded_implementation", None
    )  # put back afterwards, so that nothing stays loaded
    return calls
