"""Score the columns and choose the survivors in one launch: the kernel of received_attention and of prune_tokens.

scores[b, n] = reduce over heads, rows of w[r] * w[r, n] * exp(scale * q[rows[r]] . k[columns[n]] - lse[r]), of all heads or
the best ones; then, if that is asked for, columns compete by them (_survivors.py).
Memory bound for few rows (each chosen key is read once), compute bound from about a hundred rows on.
Tile: BLOCK_N keys of some KV heads, one after the other, each against its query heads and their row tiles, which few rows
and heads share. Grid: (cdiv(N, BLOCK_N), parts of the KV heads, B).
The last program of a tile joins its parts, in a fixed order; the last tile of a sample selects, or joins where heads are
ranked. No float atomics, and of the batch only the widths R and N count, by which tiles, parts and warps are chosen: other
samples do not change the bits of one. The integer counters are 0 again when the kernel ends.
"""

import torch
import triton
import triton.language as tl

from vlmprune.triton_kernels._columns import padded
from vlmprune.triton_kernels._device import (
    arrives_last,
    dot_dtype,
    laid_out,
    let_next_begin,
    padded_head_dim,
    registers,
    span,
    tiles,
    wait_for_inputs,
)
from vlmprune.triton_kernels._launch import launch
from vlmprune.triton_kernels._score import finish, join_parts, rank_heads, score_part
from vlmprune.triton_kernels._survivors import choose_survivors
from vlmprune.triton_kernels.row_lse import row_lse
from vlmprune.triton_kernels.select_columns import MANY, Choice, chunks, select_columns

JOIN_CHUNK = tl.constexpr(512)
MOST_PROGRAMS = 288  # of a sample, if its heads are divided for them: two a multiprocessor of 132, or three of fewer warps
STAGES = 2  # of the loop over KV heads, where rows are few: the next head's keys are on their way
# columns x KV heads, from which on tiles have 128 columns: programs abound, and queries are read less often
WIDE = 72 * 1024


@triton.jit(
    do_not_specialize=[
        *("R", "N", "Sq", "S", "max_seqlen", "lse_stride_b", "lse_stride_h", "lse_stride_r", "heads"),
        *("positions", "keep", "segments", "first", "width", "most"),
    ]
)
def _score_select_kernel(
    query_ptr,  # [B, H, Sq, D], last dim contiguous; packed: [1, H, total, D]
    key_ptr,  # [B, Hkv, S, D], last dim contiguous; packed: [1, Hkv, total, D]
    cos_ptr,  # [B or 1, S, D] or None
    sin_ptr,
    rows_ptr,  # [B, R] int64, contiguous
    columns_ptr,  # [B, N] int64, contiguous
    key_mask_ptr,  # [B, S] uint8, contiguous, or None
    lse_ptr,  # [B, H, Sq or R] float32; None = plain logits
    weight_ptr,  # [B, R] float, contiguous, or None
    pair_ptr,  # [B, R, N] float32, contiguous, or None
    cu_seqlens_ptr,  # [B + 1], contiguous, or None
    cu_seqlens_q_ptr,
    counter_ptr,  # [B, 1 + tiles] int32, all 0, and again when done; None if nothing is counted
    part_ptr,  # [B, parts, N] float32, contiguous; of heads apart [B, H, N]; None if nothing is joined
    scores_ptr,  # [B, N] float32, contiguous, or None
    scale,
    R,
    N,
    Sq,
    S,
    max_seqlen,
    lse_stride_b,  # not a tuple, whose numbers are always specialised
    lse_stride_h,
    lse_stride_r,
    heads,  # KV heads of a part
    query_strides,  # batch, head, position
    key_strides,
    rope_strides,  # batch, position
    places_in_ptr,  # from here on a Choice; all None where index_ptr is, and nothing is selected
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
    H: tl.constexpr,
    JOINED: tl.constexpr,  # heads
    TOP: tl.constexpr,  # these are the best ones, and a part is a head
    SPLIT: tl.constexpr,  # there are parts to join
    SELECTS: tl.constexpr,  # or leaves the columns entered
    G: tl.constexpr,
    D: tl.constexpr,
    HEAD_REDUCE: tl.constexpr,
    ROW_REDUCE: tl.constexpr,
    CAUSAL: tl.constexpr,
    PDL: tl.constexpr,
    LSE_BY_POSITION: tl.constexpr,
    KEYS: tl.constexpr,
    CHUNK: tl.constexpr,
    IN_REGISTERS: tl.constexpr,
    DTYPE: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    ONE_TILE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    wait_for_inputs(PDL)
    ENTERS: tl.constexpr = index_ptr is not None
    APART: tl.constexpr = TOP or HEAD_REDUCE == "none"
    b = tl.program_id(2).to(tl.int64)
    tile, tiles_n, part, parts = tl.program_id(0), tl.num_programs(0), tl.program_id(1), tl.num_programs(1)
    start_k, length = span(cu_seqlens_ptr, b, S, max_seqlen)
    start_q, length_q = span(cu_seqlens_q_ptr, b, Sq, max_seqlen)
    if part_ptr is not None:
        part_ptr += b * (H if APART else parts) * N
    if counter_ptr is not None:
        counter_ptr += b * (1 + tiles_n)
    if key_mask_ptr is not None:
        key_mask_ptr += b * S
    if lse_ptr is not None:
        lse_ptr += b * lse_stride_b
        if LSE_BY_POSITION:
            lse_ptr += start_q * lse_stride_r
    if weight_ptr is not None:
        weight_ptr += b * R
    if pair_ptr is not None:
        pair_ptr += b * R * N
    if cos_ptr is not None:
        cos_ptr += b * rope_strides[0] + start_k * rope_strides[1]
        sin_ptr += b * rope_strides[0] + start_k * rope_strides[1]
    key_ptr += b * key_strides[0] + start_k * key_strides[2]
    query_ptr += b * query_strides[0] + start_q * query_strides[2]
    outputs, out_sizes = (index_ptr, count_ptr, kept_ptr, places_ptr, ends_ptr), (start_k, width, most)
    chosen = None
    work = None
    if ENTERS:
        work = (entries_ptr + b * 2 * padded(N), marks_ptr + b * padded(positions))
        if code_ptr is not None:
            code_ptr += b * N
        if mask_ptr is not None:
            mask_ptr += b * positions
        # samples of a packed batch have their own numbers of positions
        count = length if cu_seqlens_ptr is not None else tl.zeros((), tl.int32) + positions
        chosen = (places_in_ptr + b * N, code_ptr, mask_ptr, N, count, first)
    rows_ptr += b * R
    columns_ptr += b * N
    offs_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    sample = (
        query_ptr,
        lse_ptr,
        key_ptr,
        cos_ptr,
        sin_ptr,
        rows_ptr,
        columns_ptr,
        key_mask_ptr,
        weight_ptr,
        pair_ptr,
    )
    score = score_part(
        sample,
        (scale, R, N, length - length_q, length),
        (query_strides, key_strides, (lse_stride_h, lse_stride_r), rope_strides),
        part_ptr,
        offs_n,
        (part * heads).to(tl.int64),
        (part * heads + heads).to(tl.int64),
        *(G, HEADS, ROWS, ONE_TILE),
        "none" if APART else HEAD_REDUCE,
        *(ROW_REDUCE, LSE_BY_POSITION, (D, CAUSAL, DTYPE, BLOCK_D)),
    )
    let_next_begin(PDL)
    if scores_ptr is not None:
        scores_ptr += b * N
        last = tl.full((), True, tl.int1)
        if TOP:  # by what they receive from all columns: no tile can be finished alone
            last = arrives_last(counter_ptr, tiles_n * parts)
            if last:
                ranks = rank_heads(part_ptr, N, H)
                for start in range(0, N, JOIN_CHUNK):
                    offs = start + tl.arange(0, JOIN_CHUNK)
                    best = join_parts(part_ptr, ranks, offs, N, JOINED, HEAD_REDUCE)
                    finish(best, offs, N, scores_ptr, chosen, work, ENTERS, JOINED, HEAD_REDUCE)
                tl.debug_barrier()
        else:
            if SPLIT:
                tl.store(part_ptr + part * N + offs_n, score, mask=offs_n < N)
                last = arrives_last(counter_ptr + 1 + tile, parts)
                if last:
                    score = join_parts(part_ptr, None, offs_n, N, parts, HEAD_REDUCE)
            if last:
                finish(score, offs_n, N, scores_ptr, chosen, work, ENTERS, JOINED, HEAD_REDUCE)
                if SELECTS:
                    last = arrives_last(counter_ptr, tiles_n)
        if SELECTS:
            choice = (quota_ptr, segments_ptr, keep, segments)
            if last:
                choose_survivors(
                    chosen,
                    choice,
                    *(work, outputs, out_sizes),
                    b,
                    tl.num_programs(2) - 1,
                    *(0, 1, False, NEWEST, LEFT, KEYS, CHUNK, IN_REGISTERS),
                )


def score(s, choice=None):
    """Launch the row statistics if needed and the score kernel; [B, H, N] for head_reduce "none", else [B, N].

    With a Choice the kernel selects, too, or among many columns select_columns does.
    """
    (H, Sq, D), (Hkv, S), (B, R), N = s.query.shape[1:], s.key.shape[1:3], s.rows.shape, s.columns.shape[1]
    s, query_strides, key_strides, rope_strides = laid_out(s)
    # [B, H, Sq] if it was given, else [B, H, R]; None for plain logits
    lse = s.lse if s.normalize == "none" or s.lse is not None else row_lse(s)
    selects = choice is not None and N <= MANY
    config, joins, top = _config(s, selects), s.head_reduce != "none", s.top_heads is not None
    n_tiles = max(1, triton.cdiv(N, config["BLOCK_N"]))
    parts = _parts(Hkv, n_tiles)
    apart, split = top or not joins, joins and not top and parts > 1
    part = counter = scores = None
    if apart or split:
        part = s.query.new_empty((B, H if apart else parts, N), dtype=torch.float32)
    if joins:
        scores = s.query.new_empty((B, N), dtype=torch.float32)
    if top or split or selects:
        counter = s.query.new_zeros((B, 1 + n_tiles), dtype=torch.int32)
    launch(
        _score_select_kernel,
        (n_tiles, parts, B),
        *(s.query, s.key, s.cos, s.sin, s.rows, s.columns, s.key_mask),
        *(lse, s.row_weight, s.pair_weight, s.cu_seqlens, s.cu_seqlens_q, counter, part, scores),
        *(s.scale, R, N, Sq, S, s.max_seqlen, *_lse_strides(s, lse), Hkv // parts),
        *(query_strides, key_strides, rope_strides),
        *(choice or Choice()),
        H=H,
        JOINED=s.top_heads if top else H,
        TOP=top,
        SPLIT=split,
        SELECTS=selects,
        G=H // Hkv,
        D=D,
        HEAD_REDUCE=s.head_reduce,
        ROW_REDUCE=s.row_reduce,
        CAUSAL=s.causal,
        LSE_BY_POSITION=s.lse is not None,
        DTYPE=dot_dtype(s.query),
        BLOCK_D=padded_head_dim(D),
        **config,
    )
    if choice is not None and not selects:
        select_columns(choice, cu_seqlens=s.cu_seqlens, total=S)
    return scores if joins else part


def _parts(Hkv, n_tiles):
    """Into how many parts to divide the KV heads of a tile: as many as give programs that run at once, or one."""
    return max(n for n in range(1, Hkv + 1) if Hkv % n == 0 and (n * n_tiles <= MOST_PROGRAMS or n == 1))


def _config(s, selects):
    """Tiles, warps and registers of a program, which may be the one that ``selects``."""
    G, R, N = s.query.shape[1] // s.key.shape[1], s.rows.shape[1], s.columns.shape[1]
    config = tiles(s.query, R, s.cos is not None)
    # the rows of all heads of a group share a product if 16 or 32 hold them
    block, heads = config.pop("BLOCK_M"), triton.next_power_of_2(G)
    together = next((m for m in (16, 32) if heads * R <= m <= max(16, config["BLOCK_N"])), None)
    rows, heads = (block, 1) if together is None else (together // heads, heads)
    at_once = chunks(N if selects else 0)
    warps = max(config["num_warps"], at_once["num_warps"])
    # Few rows are memory bound: two programs of 8 warps shall share a multiprocessor, as those of 4 do with any number. No
    # lower limit for these: ptxas fills it with loads ahead of their use, and spills.
    few_rows = R <= 16 and s.cos is None and s.query.element_size() == 2
    if few_rows and config["BLOCK_N"] == 64:
        config |= {"num_stages": STAGES, "BLOCK_N": 128 if N * s.key.shape[1] >= WIDE else 64}
    shape = {"HEADS": heads, "ROWS": rows, "ONE_TILE": heads >= G and rows >= R, "num_warps": warps}
    return config | at_once | shape | registers(128 if few_rows and warps == 8 else 255)


def _lse_strides(s, lse):
    """Strides by batch, head, row; a given one of a packed batch is ``[H, total_q]``, or has a batch dim of 1."""
    if lse is None:
        return 0, 0, 0
    packed = s.lse is not None and s.cu_seqlens is not None
    return 0 if packed else lse.stride(0), *lse.stride()[-2:]
