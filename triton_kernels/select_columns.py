"""Which columns and positions survive, by scores that are there: what the score kernel does behind its scores, alone.

Latency bound: a sample is a few thousand numbers. Tile: CHUNK columns or positions. Grid: (B,).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from vlmprune.triton_kernels._launch import launch
from vlmprune.triton_kernels._survivors import choose_survivors
from vlmprune.triton_kernels.select_topk import REGISTERS

FEW = 1024  # columns that 4 warps hold in registers, 8 a thread; with 4 a thread more warps hold none and need not spill


class Choice(NamedTuple):
    """How columns compete, and where the result goes: arguments that two kernels take in this order."""

    quota: torch.Tensor | None = None  # [B, segments] int64, contiguous; None = keep
    code: torch.Tensor | None = None  # [B, N] int8, contiguous, or None
    lengths: torch.Tensor | None = None  # [B, segments] int64, contiguous; None = one segment, all columns
    keys: torch.Tensor | None = None  # [B, N] int32, contiguous: workspace, as is
    place: torch.Tensor | None = None  # [B, longest] int32, contiguous
    index: torch.Tensor | None = None  # [B, width] int64, contiguous; packed: [1, width]
    count: torch.Tensor | None = None  # [B] int64
    kept: torch.Tensor | None = None  # [B, most] int64, contiguous
    places: torch.Tensor | None = None  # [B, most] int64, contiguous
    ends: torch.Tensor | None = None  # [B + 1] like cu_seqlens, or None
    keep: int = 0
    segments: int = 1
    first: int = 0  # position of the first row of the tensors
    width: int = 0
    most: int = 0
    newest: bool = False
    left: bool = False

    @classmethod
    def of(cls, selection, columns, longest, rows, cu_seqlens=None):
        """Allocate for a Selection."""
        (B, N), s = columns.shape, selection
        quota, code, lengths = (None if x is None else x.contiguous() for x in (s.quota, s.code, s.segments))
        shapes = ((B if cu_seqlens is None else 1, s.width), (B,), (B, s.most), (B, s.most))
        outputs = [columns.new_empty(shape) for shape in shapes]
        ends = None if cu_seqlens is None else torch.empty_like(cu_seqlens)
        work = [columns.new_empty((B, n), dtype=torch.int32) for n in (N, longest)]
        segments = 1 if lengths is None else lengths.shape[1]
        sizes = (s.keep, segments, longest - rows, s.width, s.most)
        return cls(quota, code, lengths, *work, *outputs, ends, *sizes, s.newest, s.left)

    def clear(self):
        """What a packed batch of no samples leaves."""
        self.index.fill_(-1)
        if self.ends is not None:
            self.ends.zero_()


@triton.jit(
    do_not_specialize=["N", "S", "keep", "segments", "first", "width", "most"],
)
def _select_columns_kernel(
    scores_ptr,  # [B, N] float32, contiguous
    columns_ptr,  # [B, N] int64, contiguous
    key_mask_ptr,  # [B, S] uint8, contiguous, or None
    N,
    S,
    quota_ptr,  # from here on a Choice
    code_ptr,
    segments_ptr,
    keys_ptr,
    place_ptr,
    index_ptr,
    count_ptr,
    kept_ptr,
    places_ptr,
    ends_ptr,
    keep,
    segments,
    first,
    width,
    most,
    NEWEST: tl.constexpr,
    LEFT: tl.constexpr,
    CHUNK: tl.constexpr,
    ONE_CHUNK: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    length = tl.zeros((), tl.int32) + S
    if key_mask_ptr is not None:
        key_mask_ptr += b * S
    if code_ptr is not None:
        code_ptr += b * N
    choose_survivors(
        (scores_ptr + b * N, columns_ptr + b * N, code_ptr, key_mask_ptr, N, length, first),
        (quota_ptr, segments_ptr, keep, segments),
        (keys_ptr, place_ptr),
        (index_ptr, count_ptr, kept_ptr, places_ptr, ends_ptr),
        (tl.zeros((), tl.int64), S, width, most),
        b,
        tl.num_programs(0) - 1,
        NEWEST,
        LEFT,
        CHUNK,
        ONE_CHUNK,
    )


def chunks(N, warps=16):
    """Columns at a time for ``N``, at ``warps`` if they are many: one of two, so that prompts of many lengths meet few kernels."""
    few = N <= FEW
    return {"CHUNK": FEW if few else warps * 128, "ONE_CHUNK": few, "num_warps": 4 if few else warps}


def select_columns(scores, columns, key_mask, S, choice):
    """Launch one program a sample; all as the kernel has it."""
    N = scores.shape[1]
    args = (scores, columns, key_mask, N, S)
    launch(_select_columns_kernel, (len(scores),), *args, *choice, **chunks(N), **REGISTERS)
