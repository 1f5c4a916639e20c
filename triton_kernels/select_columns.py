"""Which columns and positions survive, by scores that are there: what the score kernel does behind its scores, alone.

Latency bound: a sample is a few thousand numbers. Tile: CHUNK columns or positions. Grid: (B,).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from vlmprune.triton_kernels._device import as_bytes
from vlmprune.triton_kernels._launch import launch
from vlmprune.triton_kernels._survivors import choose_survivors, clear_marks, enter_columns
from vlmprune.triton_kernels.select_topk import REGISTERS

FEW, MANY = 1024, 4096  # columns that 4 warps hold in registers, 8 a thread, and 8 warps, 16 a thread


class Choice(NamedTuple):
    """How columns compete, and where the result goes: arguments that two kernels take in this order."""

    columns: torch.Tensor | None = None  # [B, N] int64, contiguous: their positions in what gets shorter
    mask: torch.Tensor | None = None  # [B, positions] uint8, contiguous, or None
    quota: torch.Tensor | None = None  # [B, segments] int64, contiguous; None = keep
    code: torch.Tensor | None = None  # [B, N] int8, contiguous, or None
    lengths: torch.Tensor | None = None  # [B, segments] int64, contiguous; None = one segment, all columns
    keys: torch.Tensor | None = None  # [B, N] int32, contiguous: workspace, as is
    marks: torch.Tensor | None = None  # [B, positions] int32, contiguous: workspace, too
    index: torch.Tensor | None = None  # [B, width] int64, contiguous; packed: [1, width]
    count: torch.Tensor | None = None  # [B] int64
    kept: torch.Tensor | None = None  # [B, most] int64, contiguous
    places: torch.Tensor | None = None  # [B, most] int64, contiguous
    ends: torch.Tensor | None = None  # [B + 1] like cu_seqlens, or None
    positions: int = 0  # of the longest sample
    keep: int = 0
    segments: int = 1
    first: int = 0  # position of the first row of the tensors
    width: int = 0
    most: int = 0
    newest: bool = False
    left: bool = False

    @classmethod
    def of(cls, selection, columns, mask, positions, rows, cu_seqlens=None):
        """Allocate for a Selection from columns of ``positions``, the last ``rows`` of which get shorter."""
        (B, N), s = columns.shape, selection
        lists = [None if x is None else x.contiguous() for x in (s.quota, s.code, s.segments)]
        shapes = ((B if cu_seqlens is None else 1, s.width), (B,), (B, s.most), (B, s.most))
        outputs = [columns.new_empty(shape) for shape in shapes]
        ends = None if cu_seqlens is None else torch.empty_like(cu_seqlens)
        work = [columns.new_empty((B, n), dtype=torch.int32) for n in (N, positions)]
        segments = 1 if s.segments is None else s.segments.shape[1]
        sizes = (positions, s.keep, segments, positions - rows, s.width, s.most)
        return cls(
            columns.contiguous(), as_bytes(mask), *lists, *work, *outputs, ends, *sizes, s.newest, s.left
        )

    def clear(self):
        """What a packed batch of no samples leaves."""
        self.index.fill_(-1)
        if self.ends is not None:
            self.ends.zero_()


@triton.jit(
    do_not_specialize=["N", "positions", "keep", "segments", "first", "width", "most"],
)
def _select_columns_kernel(
    scores_ptr,  # [B, N] float32, contiguous
    N,
    columns_ptr,  # from here on a Choice
    mask_ptr,
    quota_ptr,
    code_ptr,
    segments_ptr,
    keys_ptr,
    marks_ptr,
    index_ptr,
    count_ptr,
    kept_ptr,
    places_ptr,
    ends_ptr,
    positions,
    keep,
    segments,
    first,
    width,
    most,
    NEWEST: tl.constexpr,
    LEFT: tl.constexpr,
    KEYS: tl.constexpr,
    CHUNK: tl.constexpr,
    IN_REGISTERS: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    keys_ptr += b * N
    marks_ptr += b * positions
    if mask_ptr is not None:
        mask_ptr += b * positions
    if code_ptr is not None:
        code_ptr += b * N
    sample = (columns_ptr + b * N, code_ptr, mask_ptr, N, positions, first)
    clear_marks(marks_ptr, positions, 0, 1, CHUNK)
    for start in range(0, N, CHUNK):
        offs = start + tl.arange(0, CHUNK)
        enter_columns(sample, keys_ptr, tl.load(scores_ptr + b * N + offs, mask=offs < N, other=0.0), offs)
    tl.debug_barrier()
    choose_survivors(
        sample,
        (quota_ptr, segments_ptr, keep, segments),
        (keys_ptr, marks_ptr),
        (index_ptr, count_ptr, kept_ptr, places_ptr, ends_ptr),
        (tl.zeros((), tl.int64), width, most),
        b,
        tl.num_programs(0) - 1,
        *(NEWEST, LEFT, KEYS, CHUNK, IN_REGISTERS),
    )


def chunks(N):
    """Columns at a time for ``N``: of three kinds, so that prompts of many lengths meet few kernels.

    Of more than MANY the keys are read anew in each round of the search, from the nearest cache.
    """
    chunk = FEW if N <= FEW else MANY
    return {"KEYS": chunk, "CHUNK": chunk, "IN_REGISTERS": N <= MANY, "num_warps": 4 if N <= FEW else 8}


def select_columns(scores, choice):
    """Launch one program a sample; all as the kernel has it."""
    N = scores.shape[1]
    launch(_select_columns_kernel, (len(scores),), scores, N, *choice, **chunks(N), **REGISTERS)
