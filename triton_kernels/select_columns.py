"""Which columns and positions survive: what the score kernel does behind its scores, alone, where they are given or many.

Latency bound: a sample is a few thousand numbers. Tile: CHUNK columns or positions. Grid: (shares, B); each program of a
sample finds the last kept column by itself, then numbers its own share of the columns and of the positions around them.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from vlmprune.triton_kernels._columns import enter_columns, padded
from vlmprune.triton_kernels._device import as_bytes, let_next_begin, registers, span, wait_for_inputs
from vlmprune.triton_kernels._launch import launch
from vlmprune.triton_kernels._survivors import choose_survivors

FEW, MANY = 1024, 4096  # columns: up to MANY are selected by the program that scores the last of them
MAX_KEYS = 32768
SHARE = 2048  # columns at a time, and of a program where several work on a sample


class Choice(NamedTuple):
    """How columns compete, and where the result goes: arguments that two kernels take in this order."""

    columns: torch.Tensor | None = None  # [B, N] int64, contiguous: their positions in what gets shorter
    mask: torch.Tensor | None = None  # [B, positions] uint8, contiguous, or None
    quota: torch.Tensor | None = None  # [B, segments] int64, contiguous; None = keep
    code: torch.Tensor | None = None  # [B, N] int8, contiguous, or None
    lengths: torch.Tensor | None = None  # [B, segments] int64, contiguous; None = one segment, all columns
    entries: torch.Tensor | None = None  # [B, 2, padded(N)] int32, contiguous: workspace
    marks: torch.Tensor | None = None  # [B, padded(positions)] int32, contiguous: workspace, too
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
        work = [
            columns.new_empty((B, n), dtype=torch.int32) for n in (2 * padded.fn(N), padded.fn(positions))
        ]
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
    do_not_specialize=["total", "N", "positions", "keep", "segments", "first", "width", "most"],
)
def _select_columns_kernel(
    scores_ptr,  # [B, N] float32, contiguous; None if the columns are entered
    cu_seqlens_ptr,  # [B + 1], contiguous, or None
    total,  # positions of a packed batch
    N,
    columns_ptr,  # from here on a Choice
    mask_ptr,
    quota_ptr,
    code_ptr,
    segments_ptr,
    entries_ptr,
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
    SHARED: tl.constexpr,
    PDL: tl.constexpr,
    KEYS: tl.constexpr,
    CHUNK: tl.constexpr,
    IN_REGISTERS: tl.constexpr,
):
    wait_for_inputs(PDL)
    let_next_begin(PDL)
    b = tl.program_id(1).to(tl.int64)
    if mask_ptr is not None:
        mask_ptr += b * positions
    if code_ptr is not None:
        code_ptr += b * N
    sample = (columns_ptr + b * N, code_ptr, mask_ptr, N, positions, first)
    if cu_seqlens_ptr is not None:
        start_k, length = span(cu_seqlens_ptr, b, total, positions)
        sample = (columns_ptr + b * N, code_ptr, mask_ptr, N, length, first)
    else:
        start_k = tl.zeros((), tl.int64)
    work = (entries_ptr + b * 2 * padded(N), marks_ptr + b * padded(positions))
    if scores_ptr is not None:
        for start in range(0, padded(N), CHUNK):
            offs = start + tl.arange(0, CHUNK)
            score = tl.load(scores_ptr + b * N + offs, mask=offs < N, other=0.0)
            enter_columns(sample, work, score, offs)
        tl.debug_barrier()
    choose_survivors(
        sample,
        (quota_ptr, segments_ptr, keep, segments),
        work,
        (index_ptr, count_ptr, kept_ptr, places_ptr, ends_ptr),
        (start_k, width, most),
        b,
        tl.num_programs(1) - 1,
        *(tl.program_id(0), tl.num_programs(0)),
        *(SHARED, NEWEST, LEFT, KEYS, CHUNK, IN_REGISTERS),
    )


def chunks(N):
    """Columns at a time: of few kinds, so that prompts of many lengths meet few kernels.

    Of up to MAX_KEYS the keys stay in registers, 8, 16, 64 or 128 a thread; of more each round of the search reads them anew.
    """
    keys, chunk, warps = (FEW, FEW, 4) if N <= FEW else (MANY, SHARE, 8)
    if N > MANY:
        keys = MAX_KEYS // 2 if N <= MAX_KEYS // 2 else MAX_KEYS if N <= MAX_KEYS else MAX_KEYS // 4
    return {"KEYS": keys, "CHUNK": chunk, "IN_REGISTERS": N <= MAX_KEYS, "num_warps": warps}


def select_columns(choice, scores=None, cu_seqlens=None, total=0):
    """Launch one program a sample, or several where many columns compete in the plainest way.

    Args:
        choice: where the result goes.
        scores: [B, N] float32; None if the columns are entered.
        cu_seqlens, total: of a packed batch, and its positions in all.
    """
    B, N = choice.columns.shape
    plain = choice.code is None and choice.lengths is None and cu_seqlens is None
    plain = plain and not choice.left and choice.first == 0 and (scores is None or not choice.newest)
    shared = plain and N > MANY
    shares = triton.cdiv(N, SHARE) if shared else 1
    args = (scores, cu_seqlens, total, N, *choice)
    launch(_select_columns_kernel, (shares, B), *args, SHARED=shared, **chunks(N), **registers(255))
