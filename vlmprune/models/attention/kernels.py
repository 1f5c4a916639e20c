"""Exact-attention kernels that also give the log-sum-exp of every row, and which of them can run where.

flash-attn's three generations and torch's own flash kernels, under one call. No flash-attn can be asked what it takes, so
the limits here were read in its sources (August 2026); what another release refuses all the same goes to the next kernel.
Padding needs no unpacking: the padded batch is read as one long list of sequences, each sample's padding being one.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from vlmprune.models.attention.flash_call import AttentionCall as AttentionCall
from vlmprune.models.attention.flash_call import bounds as bounds
from vlmprune.models.attention.flash_call import bounds_mask as bounds_mask

GPU = "cuda"
HALVES = (torch.float16, torch.bfloat16)
Result = tuple[Tensor, Tensor | None]
"""Output ``[B, Sq, H, D]`` and log-sum-exp ``[B, H, Sq]`` (float32, natural), None where the kernel gave none."""


class Refused(Exception):
    """A kernel's package does not support a call; the text is the package's own."""


@dataclass(frozen=True)
class Kernel:
    """One way to run a call.

    Attributes:
        name: what people call it.
        why_not: the reason it cannot run on a device, or None.
        takes: whether it can run this call.
        run: runs it; the flag asks for the log-sum-exp.
        spare: only worth calling for what SDPA does not offer: the log-sum-exp, or sequence bounds.
        refused: kinds of call it has refused, and why; such a call is not tried again.
    """

    name: str
    why_not: Callable[[torch.device], str | None]
    takes: Callable[[AttentionCall], bool]
    run: Callable[[AttentionCall, bool], Result]
    spare: bool = False
    refused: dict[tuple[torch.device, torch.dtype, int], str] = field(default_factory=dict, compare=False)

    def explain(self, device: torch.device) -> str | None:
        """Why it cannot run on a device, or what it has refused there; None = nothing is known against it."""
        refused = [
            f"refused {str(dtype).removeprefix('torch.')} with head dim {size}: {why}"
            for (where, dtype, size), why in self.refused.items()
            if where.type == device.type and device.index in (None, where.index)
        ]
        return self.why_not(device) or "; ".join(refused) or None


def attend(call: AttentionCall, want_lse: bool) -> Result | None:
    """What the best kernel for this call gives, or the next best where that refuses; None = plain SDPA is to run it."""
    while (kernel := choose(call, want_lse)) is not None:
        try:
            return kernel.run(call, want_lse)
        except Refused as reason:
            kernel.refused[call.kind] = str(reason)
    return None


def choose(call: AttentionCall, want_lse: bool) -> Kernel | None:
    """The kernel for this call; None = plain SDPA is as good or the only one that can."""
    if not want_lse and not call.packed and (call.mask is not None or call.query.device.type != GPU):
        return None  # without looking any further: this is every step of a compiled decode
    for kernel in usable(call.query.device):
        known = call.kind not in kernel.refused and kernel.takes(call)
        if known and (want_lse or call.packed or not kernel.spare):
            return kernel
    return None


@cache
def usable(device: torch.device) -> tuple[Kernel, ...]:
    """The kernels that run on a device, best first."""
    return tuple(kernel for kernel in KERNELS if kernel.why_not(device) is None)


def takes_bounds(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether padded batches may be described by sequence bounds here, rather than by a mask of S x S."""
    return device.type == GPU and dtype in HALVES and bool(usable(device))


# flash-attn, generations 2 to 4


def capability(device: torch.device) -> int:
    """Major compute capability."""
    return torch.cuda.get_device_capability(device)[0]


@cache
def load(module: str) -> Any:
    """A flash-attn module with the two functions needed, or the reason why there is none, as text."""
    try:
        found = import_module(module)
    except (ImportError, AttributeError) as error:  # the latter: built for another release of what it imports
        return f"{module} cannot be imported: {error}"
    missing = [n for n in ("flash_attn_func", "flash_attn_varlen_func") if not hasattr(found, n)]
    return f"{module} has no {missing[0]}" if missing else found


def no_gpu(device: torch.device, majors: Iterable[int]) -> str | None:
    """Why a kernel for these compute capabilities cannot run on a device."""
    if device.type != GPU:
        return f"needs a {GPU} device, got {device.type}"
    major = capability(device)
    return (
        None if major in majors else f"needs compute capability {' or '.join(map(str, majors))}, got {major}"
    )


EVERY, SMALL = range(8, 257, 8), range(8, 129, 8)
"""Head dims."""


def flash_attn(
    name: str, module: str, sizes: dict[int, Container[int]], dropout: bool = False, trains: bool = True
) -> Kernel:
    """The kernel of one generation of the flash-attn package.

    Args:
        name: what people call it.
        module: where its functions are.
        sizes: major compute capability -> head dims it takes there.
        dropout, trains: whether it has dropout, and a backward.
    """

    def why_not(device: torch.device) -> str | None:
        found = no_gpu(device, sizes) or load(module)
        return found if isinstance(found, str) else None

    def takes(call: AttentionCall) -> bool:
        fits = takes_half(call) and call.query.shape[-1] in sizes[capability(call.query.device)]
        return fits and (dropout or call.dropout == 0) and (trains or not call.trains)

    def run(call: AttentionCall, want_lse: bool) -> Result:
        wanted: dict[str, Any] = {"causal": call.causal, "softmax_scale": call.scale}
        if dropout:
            wanted["dropout_p"] = call.dropout
        function = load(module).flash_attn_func
        if call.packed:
            function, length = load(module).flash_attn_varlen_func, call.query.shape[2]
            wanted |= {"cu_seqlens_q": call.mask, "cu_seqlens_k": call.mask}
            wanted |= {"max_seqlen_q": length, "max_seqlen_k": length}
        return _result(call, *_ask(function, want_lse, *_inputs(call), **wanted))

    return Kernel(name, why_not, takes, run)


UNSUPPORTED = re.compile("only supports|not support")
"""How the second and third generation say it, in a RuntimeError, which a full memory is too; the fourth asserts."""


def _ask(function: Callable[..., Any], want_lse: bool, *args: Any, **wanted: Any) -> Result:
    """Call it, asked for its log-sum-exp by the name its generation has for that; raises Refused."""
    names = inspect.signature(function).parameters
    wanted |= {name: want_lse for name in ("return_attn_probs", "return_lse") if name in names}
    try:
        result = function(*args, **wanted)
    except (AssertionError, RuntimeError) as error:
        if isinstance(error, AssertionError) or UNSUPPORTED.search(str(error)):
            raise Refused(str(error).partition("\n")[0] or "an assertion without words") from error
        raise
    return result[:2] if isinstance(result, tuple) else (result, None)


def takes_half(call: AttentionCall) -> bool:
    """What all flash kernels on a GPU ask for."""
    fits = call.query.dtype in HALVES and call.query.shape[-1] in EVERY
    if call.packed and call.query.shape[2] == 1:
        return False  # by torch's source they fold grouped heads into the row then, and take each bound for a sample
    return call.alike and fits and (call.mask is None or call.packed)


def _inputs(call: AttentionCall) -> list[Tensor]:
    """Query, key and value ``[B, S, H, D]``; packed ``[B * S, H, D]``."""
    qkv = [x.transpose(1, 2) for x in (call.query, call.key, call.value)]
    return [x.flatten(0, 1) for x in qkv] if call.packed else qkv


def _result(call: AttentionCall, out: Tensor, lse: Tensor | None) -> Result:
    if not call.packed:
        return out, lse
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


def _takes_torch_gpu(call: AttentionCall) -> bool:
    # Some GPUs have no backward for more than 192: SDPA knows which.
    return takes_half(call) and (call.query.shape[-1] <= 192 or not call.trains)


def _run_torch_gpu(call: AttentionCall, want_lse: bool) -> Result:
    forward = torch.ops.aten._flash_attention_forward
    sizes = call.mask, call.mask, call.query.shape[2], call.key.shape[2]
    out, lse, *_ = forward(*_inputs(call), *sizes, call.dropout, call.causal, False, scale=call.scale)
    return _result(call, out, lse)


def _why_not_torch_cpu(device: torch.device) -> str | None:
    here = None if device.type == "cpu" else f"needs a CPU, got {device.type}"
    return here or _has("_scaled_dot_product_flash_attention_for_cpu")


def _takes_torch_cpu(call: AttentionCall) -> bool:
    return call.alike and call.dropout == 0 and not call.packed


def _run_torch_cpu(call: AttentionCall, want_lse: bool) -> Result:
    mask = call.mask
    if mask is not None and mask.dtype == torch.bool:  # this kernel only adds
        mask = torch.zeros(mask.shape, dtype=call.query.dtype).masked_fill(~mask, float("-inf"))
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    qkv = call.query, call.key, call.value
    out, lse = forward(*qkv, 0.0, call.causal and mask is None, attn_mask=mask, scale=call.scale)
    return out.transpose(1, 2), lse


BLACKWELL = (*SMALL, 256)
KERNELS: tuple[Kernel, ...] = (
    flash_attn("flash-attn 3", "flash_attn_interface", {9: EVERY}),
    # flash_attn/cute/interface.py, _validate_head_dims. On 12.x it checks nothing; more does not fit the shared memory.
    flash_attn("flash-attn 4", "flash_attn.cute", {9: EVERY, 10: BLACKWELL, 11: BLACKWELL, 12: SMALL}),
    flash_attn("flash-attn 2", "flash_attn", dict.fromkeys((8, 9, 10, 11, 12), EVERY), dropout=True),
    # untuned: the second generation first
    flash_attn("flash-attn 4 on 8.x", "flash_attn.cute", {8: SMALL}, trains=False),
    Kernel("torch flash", _why_not_torch_gpu, _takes_torch_gpu, _run_torch_gpu, spare=True),
    Kernel("torch flash for CPU", _why_not_torch_cpu, _takes_torch_cpu, _run_torch_cpu, spare=True),
)
