"""Exact-attention kernels that also give the log-sum-exp of every row, and which of them can run where.

flash-attn's three generations and torch's own flash kernels, under one call. Padding needs no unpacking here: the
padded batch is read as one long row of sequences in which every sample's padding is a sequence of its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

GPU = "cuda"
HALVES = (torch.float16, torch.bfloat16)
Result = tuple[Tensor, Tensor | None]
"""Output ``[B, Sq, H, D]`` and log-sum-exp ``[B, H, Sq]`` (float32, natural), None where the kernel gave none."""


@dataclass(frozen=True)
class Call:
    """One attention call. Causal means lower-right aligned; a call that is causal and has no mask is square.

    Attributes:
        query: ``[B, H, Sq, D]``; key, value: ``[B, Hkv, S, D]``.
        mask: None; 1-D int32 sequence bounds (``bounds``); or ``[B, 1 or H, Sq, S]``, bool (True = seen) or added.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    causal: bool
    scale: float | None
    dropout: float

    @property
    def packed(self) -> bool:
        """Whether the mask is a list of sequence bounds."""
        return self.mask is not None and self.mask.ndim == 1


@dataclass(frozen=True)
class Kernel:
    """One way to run a call.

    Attributes:
        name: what people call it.
        why_not: the reason it cannot run on a device, or None.
        takes: whether it can run this call.
        run: runs it; the flag asks for the log-sum-exp.
        spare: only worth calling for what SDPA does not offer: the log-sum-exp, or sequence bounds.
    """

    name: str
    why_not: Callable[[torch.device], str | None]
    takes: Callable[[Call], bool]
    run: Callable[[Call, bool], Result]
    spare: bool = False


def choose(call: Call, want_lse: bool) -> Kernel | None:
    """The kernel for this call; None = plain SDPA is as good or the only one that can."""
    if not want_lse and not call.packed and (call.mask is not None or call.query.device.type != GPU):
        return None  # without looking any further: this is every step of a compiled decode
    for kernel in usable(call.query.device):
        if kernel.takes(call) and (want_lse or call.packed or not kernel.spare):
            return kernel
    return None


@cache
def usable(device: torch.device) -> tuple[Kernel, ...]:
    """The kernels that run on a device, best first."""
    return tuple(kernel for kernel in KERNELS if kernel.why_not(device) is None)


def takes_bounds(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether padded batches may be described by sequence bounds here, rather than by a mask of S x S."""
    return device.type == GPU and dtype in HALVES and bool(usable(device))


# Sequence bounds


def bounds(valid: Tensor) -> Tensor:
    """Bounds ``[3 B + 1]`` int32 of the sequences in a padded batch: padding before, tokens, padding after, per sample.

    Args:
        valid: bool ``[B, S]``, in every row one run of True (or none).
    """
    batch, length = valid.shape
    first = valid.int().argmax(1)
    edges = torch.stack([torch.zeros_like(first), first, first + valid.sum(1)], dim=1)
    edges = edges + torch.arange(0, batch * length, length, device=valid.device)[:, None]
    return torch.cat([edges.flatten(), edges.new_full((1,), batch * length)]).int()


def bounds_mask(call: Call) -> Tensor:
    """The bool mask ``[B, 1, S, S]`` that causal attention within a packed call's sequences amounts to."""
    assert call.mask is not None
    batch, _, length, _ = call.query.shape
    place = torch.arange(batch * length, device=call.mask.device)
    sequence = torch.bucketize(place, call.mask, right=True).view(batch, 1, length)
    same = sequence[..., :, None] == sequence[..., None, :]
    return same & torch.ones(length, length, dtype=torch.bool, device=place.device).tril()


# flash-attn, generations 2 to 4


def capability(device: torch.device) -> int:
    """Major compute capability."""
    return torch.cuda.get_device_capability(device)[0]


@cache
def load(module: str) -> Any:
    """A flash-attn module with the two functions needed, or the reason why there is none, as text."""
    try:
        found = import_module(module)
    except ImportError as error:
        return f"{module} cannot be imported: {error}"
    missing = [n for n in ("flash_attn_func", "flash_attn_varlen_func") if not hasattr(found, n)]
    return f"{module} has no {missing[0]}" if missing else found


def no_gpu(device: torch.device, majors: tuple[int, ...]) -> str | None:
    """Why a kernel for these compute capabilities cannot run on a device."""
    if device.type != GPU:
        return f"needs a {GPU} device, got {device.type}"
    major = capability(device)
    return (
        None if major in majors else f"needs compute capability {' or '.join(map(str, majors))}, got {major}"
    )


def flash_attn(generation: int, module: str, majors: tuple[int, ...], dropout: bool) -> Kernel:
    """The kernel of one generation of the flash-attn package."""

    def why_not(device: torch.device) -> str | None:
        found = no_gpu(device, majors) or load(module)
        return found if isinstance(found, str) else None

    def takes(call: Call) -> bool:
        return takes_half(call) and (dropout or call.dropout == 0)

    def run(call: Call, want_lse: bool) -> Result:
        wanted: dict[str, Any] = {"causal": call.causal, "softmax_scale": call.scale}
        if dropout:
            wanted["dropout_p"] = call.dropout
        if not call.packed:
            q, k, v = (x.transpose(1, 2) for x in (call.query, call.key, call.value))
            return _pair(*_ask(load(module).flash_attn_func, want_lse)(q, k, v, **wanted))
        length = call.query.shape[2]
        ends: dict[str, Any] = {"cu_seqlens_q": call.mask, "cu_seqlens_k": call.mask}
        ends |= {"max_seqlen_q": length, "max_seqlen_k": length}
        out = _ask(load(module).flash_attn_varlen_func, want_lse)(*_packed(call), **ends, **wanted)
        return _unpacked(call, *_pair(*out))

    return Kernel(f"flash-attn {generation}", why_not, takes, run)


def _ask(function: Callable[..., Any], want_lse: bool) -> Callable[..., tuple[Any, ...]]:
    """The function, returning a tuple and asked for its log-sum-exp by the name its generation has for that."""
    names = inspect.signature(function).parameters
    flag = {name: want_lse for name in ("return_attn_probs", "return_lse") if name in names}

    def call(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        result = function(*args, **flag, **kwargs)
        return result if isinstance(result, tuple) else (result, None)

    return call


def _pair(out: Tensor, lse: Tensor | None, *rest: Any) -> Result:
    return out, lse


def takes_half(call: Call) -> bool:
    """What all flash kernels on a GPU ask for."""
    q, k, v = call.query, call.key, call.value
    alike = q.dtype == k.dtype == v.dtype and q.shape[-1] == v.shape[-1]
    fits = q.dtype in HALVES and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
    return alike and fits and (call.mask is None or call.packed)


def _packed(call: Call) -> list[Tensor]:
    """Query, key and value ``[B * S, H, D]``."""
    return [x.transpose(1, 2).flatten(0, 1) for x in (call.query, call.key, call.value)]


def _unpacked(call: Call, out: Tensor, lse: Tensor | None) -> Result:
    batch, heads, length, _ = call.query.shape
    if lse is not None:  # [H, B * S]; older versions lay it out by sequence, which is of no use here
        fits = tuple(lse.shape) == (heads, batch * length)
        lse = lse.view(heads, batch, length).transpose(0, 1) if fits else None
    return out.view(batch, length, *out.shape[1:]), lse


# torch


def _has(name: str) -> str | None:
    return None if hasattr(torch.ops.aten, name) else f"this torch has no aten::{name}"


def _why_not_torch_gpu(device: torch.device) -> str | None:
    return no_gpu(device, (8, 9, 10, 11, 12)) or _has("_flash_attention_forward")


def _run_torch_gpu(call: Call, want_lse: bool) -> Result:
    forward = torch.ops.aten._flash_attention_forward
    sizes: tuple[Any, ...]
    if not call.packed:
        q, k, v = (x.transpose(1, 2) for x in (call.query, call.key, call.value))
        sizes = (None, None, q.shape[1], k.shape[1])
    else:
        q, k, v = _packed(call)
        sizes = (call.mask, call.mask, call.query.shape[2], call.query.shape[2])
    out, lse, *_ = forward(q, k, v, *sizes, call.dropout, call.causal, False, scale=call.scale)
    return _unpacked(call, out, lse) if call.packed else (out, lse)


def _why_not_torch_cpu(device: torch.device) -> str | None:
    here = None if device.type == "cpu" else f"needs a CPU, got {device.type}"
    return here or _has("_scaled_dot_product_flash_attention_for_cpu")


def _takes_torch_cpu(call: Call) -> bool:
    q, k, v = call.query, call.key, call.value
    alike = q.dtype == k.dtype == v.dtype and q.shape[-1] == v.shape[-1]
    return alike and call.dropout == 0 and not call.packed


def _run_torch_cpu(call: Call, want_lse: bool) -> Result:
    mask = call.mask
    if mask is not None and mask.dtype == torch.bool:  # this kernel only adds
        mask = torch.zeros(mask.shape, dtype=call.query.dtype).masked_fill(~mask, float("-inf"))
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    qkv = call.query, call.key, call.value
    out, lse = forward(*qkv, 0.0, call.causal and mask is None, attn_mask=mask, scale=call.scale)
    return out.transpose(1, 2), lse


KERNELS: tuple[Kernel, ...] = (
    flash_attn(3, "flash_attn_interface", (9,), dropout=False),
    flash_attn(4, "flash_attn.cute", (9, 10, 11), dropout=False),
    flash_attn(2, "flash_attn", (8, 9, 10, 12), dropout=True),
    Kernel("torch flash", _why_not_torch_gpu, takes_half, _run_torch_gpu, spare=True),
    Kernel("torch flash for CPU", _why_not_torch_cpu, _takes_torch_cpu, _run_torch_cpu, spare=True),
)
