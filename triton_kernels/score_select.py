"""Score the columns and choose the survivors in one launch: the kernel of received_attention and of prune_tokens.

scores[b, n] = reduce over heads, rows of w[r] * w[r, n] * exp(scale * q[rows[r]] . k[columns[n]] - lse[r]), of all heads or
the best ones; then, if that is asked for, columns compete by them (_survivors.py).
Memory bound for few rows (each chosen key is read once), compute bound from about a hundred rows on.
Tile: BLOCK_N keys of a KV head, walked through its query heads and their row tiles. Grid: (cdiv(N, BLOCK_N), Hkv, B).
Each program writes its part; the last of a sample to arrive joins the parts in a fixed order and selects. No float
atomics, and of the batch only the widths R and N count, by which tiles and warps are chosen: other samples do not change
the bits of one. The one integer counter it has is 0 again when the kernel ends.
"""

import torch
import triton
import triton.language as tl

from vlmprune.triton_kernels._device import dot_dtype, laid_out, padded_head_dim, registers, span, tiles
from vlmprune.triton_kernels._launch import launch
from vlmprune.triton_kernels._score import join_parts, rank_heads, score_part
from vlmprune.triton_kernels._survivors import choose_survivors
from vlmprune.triton_kernels.row_lse import row_lse
from vlmprune.triton_kernels.select_columns import Choice, chunks

JOIN_CHUNK = tl.constexpr(512)
WARPS = 8  # that select from more columns than a few
MANY = 4096  # from more than these twice as many do


@triton.jit(
    do_not_specialize=[
        *("R", "N", "Sq", "S", "max_seqlen", "lse_stride_b", "lse_stride_h", "lse_stride_r"),
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
    counter_ptr,  # [B] int32, all 0, and again when done; None if nothing is joined
    part_ptr,  # [B, PARTS, N] float32, contiguous
    scores_ptr,  # [B, N] float32, contiguous, or None
    scale,
    R,
    N,
    Sq,
    S,
    max_seqlen,  # of a packed batch; where something is selected, as many as ``positions`` in any case
    lse_stride_b,  # not a tuple, whose numbers are always specialised
    lse_stride_h,
    lse_stride_r,
    query_strides,  # batch, head, position
    key_strides,
    rope_strides,  # batch, position
    places_in_ptr,  # from here on a Choice; all None where index_ptr is, and nothing is selected
    mask_ptr,
    quota_ptr,
    code_ptr,
    segments_ptr,
    keys_ptr,
    place_ptr,
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
    PARTS: tl.constexpr,  # heads, or KV heads
    JOINED: tl.constexpr,  # heads
    TOP: tl.constexpr,  # these are the best ones, and a part is a head
    G: tl.constexpr,
    D: tl.constexpr,
    HEAD_REDUCE: tl.constexpr,
    ROW_REDUCE: tl.constexpr,
    CAUSAL: tl.constexpr,
    LSE_BY_POSITION: tl.constexpr,
    CHUNK: tl.constexpr,
    ONE_CHUNK: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    b = tl.program_id(2).to(tl.int64)
    start_k, length = span(cu_seqlens_ptr, b, S, max_seqlen)
    start_q, length_q = span(cu_seqlens_q_ptr, b, Sq, max_seqlen)
    part_ptr += b * PARTS * N
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
    score_part(
        query_ptr + b * query_strides[0] + start_q * query_strides[2],
        lse_ptr,
        part_ptr,
        (
            key_ptr,
            cos_ptr,
            sin_ptr,
            rows_ptr + b * R,
            columns_ptr + b * N,
            key_mask_ptr,
            weight_ptr,
            pair_ptr,
        ),
        (scale, R, N, length - length_q, length),
        (query_strides, key_strides, (lse_stride_h, lse_stride_r), rope_strides),
        G,
        "none" if TOP else HEAD_REDUCE,
        (D, ROW_REDUCE, CAUSAL, LSE_BY_POSITION, DTYPE, BLOCK_M, BLOCK_N, BLOCK_D),
    )
    if scores_ptr is not None:
        tl.debug_barrier()  # Triton 3.6 puts none between the stores of all warps and the release by one thread
        arrived = tl.atomic_add(counter_ptr + b, 1, sem="acq_rel", scope="gpu")
        if arrived == tl.num_programs(0) * tl.num_programs(1) - 1:
            tl.store(counter_ptr + b, 0)
            scores_ptr += b * N
            ranks = rank_heads(part_ptr, N, PARTS) if TOP else None
            for start in range(0, N, JOIN_CHUNK):
                offs = start + tl.arange(0, JOIN_CHUNK)
                score = join_parts(
                    part_ptr, ranks, offs, N, JOINED if TOP else PARTS, HEAD_REDUCE, JOIN_CHUNK
                )
                if HEAD_REDUCE == "mean":
                    score = score / JOINED
                tl.store(scores_ptr + offs, score, mask=offs < N)
            if index_ptr is not None:
                if code_ptr is not None:
                    code_ptr += b * N
                if mask_ptr is not None:
                    mask_ptr += b * positions
                # samples of a packed batch have their own numbers of positions
                count = length if cu_seqlens_ptr is not None else tl.zeros((), tl.int32) + positions
                choose_survivors(
                    (scores_ptr, places_in_ptr + b * N, code_ptr, mask_ptr, N, count, first),
                    (quota_ptr, segments_ptr, keep, segments),
                    (keys_ptr, place_ptr),
                    (index_ptr, count_ptr, kept_ptr, places_ptr, ends_ptr),
                    (start_k, max_seqlen, width, most),
                    b,
                    tl.num_programs(2) - 1,
                    NEWEST,
                    LEFT,
                    CHUNK,
                    ONE_CHUNK,
                )


def score(s, choice=None):
    """Launch the row statistics if needed and the score kernel; [B, H, N] for head_reduce "none", else [B, N].

    With a Choice the kernel selects, too.
    """
    (H, Sq, D), (Hkv, S), (B, R), N = s.query.shape[1:], s.key.shape[1:3], s.rows.shape, s.columns.shape[1]
    s, query_strides, key_strides, rope_strides = laid_out(s)
    # [B, H, Sq] if it was given, else [B, H, R]; None for plain logits
    lse = s.lse if s.normalize == "none" or s.lse is not None else row_lse(s)
    config, joins, top = _config(s, choice is not None), s.head_reduce != "none", s.top_heads is not None
    part = s.query.new_empty((B, Hkv if joins and not top else H, N), dtype=torch.float32)
    scores = s.query.new_empty((B, N), dtype=torch.float32) if joins else None
    counter = s.query.new_zeros(B, dtype=torch.int32) if joins else None
    longest = s.max_seqlen if choice is None else choice.positions
    launch(
        _score_select_kernel,
        (max(1, triton.cdiv(N, config["BLOCK_N"])), Hkv, B),
        *(s.query, s.key, s.cos, s.sin, s.rows, s.columns, s.key_mask),
        *(lse, s.row_weight, s.pair_weight, s.cu_seqlens, s.cu_seqlens_q, counter, part, scores),
        *(s.scale, R, N, Sq, S, longest, *_lse_strides(s, lse)),
        *(query_strides, key_strides, rope_strides),
        *(choice or Choice()),
        PARTS=part.shape[1],
        JOINED=s.top_heads if top else H,
        TOP=top,
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
    return scores if joins else part


def _config(s, selects):
    """Tiles, warps and registers of a program, which may be the one that ``selects``."""
    R, N, rotated, half = s.rows.shape[1], s.columns.shape[1], s.cos is not None, s.query.element_size() == 2
    config, warps = tiles(s.query, R, rotated), WARPS
    spills = not half or s.cu_seqlens is not None or torch.version.hip
    if selects and N > MANY and not spills:
        # Such a program has a multiprocessor to itself, and so twice the keys: as many are in flight as with two. From a
        # big tile of rows on it is not for these that it waits.
        config["BLOCK_N"] *= 1 if config["BLOCK_M"] == 64 else 2
        warps = 2 * WARPS
    at_once = chunks(N if selects else 0, warps)
    warps = max(config["num_warps"], at_once["num_warps"])
    # Few rows are memory bound: two programs of 8 warps shall share a multiprocessor, as those of 4 do with any number. No
    # lower limit for these: ptxas fills it with loads ahead of their use, and spills.
    few_rows = R <= 16 and not rotated and half
    most = 128 if warps > WARPS or (few_rows and warps == WARPS) else 255
    return config | at_once | {"num_warps": warps} | registers(most)


def _lse_strides(s, lse):
    """Strides by batch, head, row; a given one of a packed batch is ``[H, total_q]``, or has a batch dim of 1."""
    if lse is None:
        return 0, 0, 0
    packed = s.lse is not None and s.cu_seqlens is not None
    return 0 if packed else lse.stride(0), *lse.stride()[-2:]
