"""Pieces used by two or more kernels: tile sizes, operand types, and reading rows of query or key."""

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)  # exp2 and log2 are the hardware's own; e^x = 2^(x * LOG2E)

_TL_DTYPE = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def dot_dtype(x):
    """Operand type of ``tl.dot``; the interpreter multiplies the raw bits of bfloat16, so it gets float32."""
    interpreted_bf16 = triton.knobs.runtime.interpret and x.dtype == torch.bfloat16
    return tl.float32 if interpreted_bf16 else _TL_DTYPE[x.dtype]


def padded_head_dim(D):
    """Tile width for head dim ``D``: a power of two, and at least the 16 that ``tl.dot`` needs."""
    return max(16, triton.next_power_of_2(D))


def tiles(query, n_rows, rotated):
    """Safe tiles of a score kernel: no spill on sm_80 to sm_100, Triton 3.6 to 3.9, up to head dim 128 in float32 and 256 in
    half precision (tests/compile reads it back).

    Registers per row of a tile: float32 dots are three TF32 dots on split operands, un-rotating holds four rows for one.
    """
    weight = padded_head_dim(query.shape[-1])
    weight *= (16 if query.element_size() == 4 else 1) * (4 if rotated else 1)
    block = 64 if weight <= 128 else 32 if weight <= 512 else 16
    block_m = 16 if n_rows <= 16 else block
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": max(block, 32),
        "num_warps": 8 if block_m == 64 or rotated else 4,
        "num_stages": 2 if weight <= 512 else 1,
    }


def registers(most):
    """How many registers a thread may take: said aloud, as ptxas would rather spill a word. AMD knows no such option."""
    return {} if torch.version.hip else {"maxnreg": most}


def as_bytes(mask):
    """View a bool mask as uint8, row-contiguous; None stays None."""
    return None if mask is None else mask.contiguous().view(torch.uint8)


def longest(s):
    """Positions of the longest sample of a Scoring, as far as the host knows."""
    return s.key.shape[2] if s.max_seqlen is None else s.max_seqlen


def laid_out(s):
    """(s as kernels read it: lists contiguous, the mask as bytes, max_seqlen known; strides of query, key and tables).

    Strides are by batch, head, position. Stride 0 takes a table to every sample; in a packed batch the bounds tell.
    """
    cos, sin, cu_seqlens, cu_seqlens_q = s.cos, s.sin, s.cu_seqlens, s.cu_seqlens_q
    batch_q, *query_strides = s.query.stride()[:3]
    batch_k, *key_strides = s.key.stride()[:3]
    batch_c = stride_c = 0
    if cos is not None:
        if cos.stride() != sin.stride() or cos.stride(2) != 1:
            cos, sin = cos.contiguous(), sin.contiguous()
        batch_c, stride_c = cos.stride(0) if cos.shape[0] == s.rows.shape[0] else 0, cos.stride(1)
    if cu_seqlens is not None:
        batch_q = batch_k = batch_c = 0
        cu_seqlens_q = (cu_seqlens if cu_seqlens_q is None else cu_seqlens_q).contiguous()
        cu_seqlens = cu_seqlens.contiguous()
    s = s._replace(
        rows=s.rows.contiguous(),
        columns=s.columns.contiguous(),
        key_mask=as_bytes(s.key_mask),
        row_weight=None if s.row_weight is None else s.row_weight.contiguous(),
        pair_weight=None if s.pair_weight is None else s.pair_weight.contiguous(),
        cos=cos,
        sin=sin,
        cu_seqlens=cu_seqlens,
        cu_seqlens_q=cu_seqlens_q,
        max_seqlen=longest(s),
    )
    return s, (batch_q, *query_strides), (batch_k, *key_strides), (batch_c, stride_c)


@triton.jit
def span(cu_seqlens_ptr, b, S, longest):
    """(first position, length) of sample b in a packed tensor of S positions; (0, S) if every sample has its own row."""
    start = tl.zeros((), tl.int64)
    length = tl.zeros((), tl.int32) + S
    if cu_seqlens_ptr is not None:
        start = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + b).to(tl.int64), 0), S)
        stop = tl.minimum(tl.load(cu_seqlens_ptr + b + 1).to(tl.int64), start + longest)
        length = (tl.maximum(tl.minimum(stop, S), start) - start).to(tl.int32)
    return start, length


@triton.jit
def wait_for_inputs(PDL: tl.constexpr):
    """Before the first access to memory: what the launch before this one wrote is there, whenever this one began."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def let_next_begin(PDL: tl.constexpr):
    """The next launch may take the multiprocessors that are free; it waits for the end of this one."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def arrives_last(counter_ptr, expected):
    """Count this program in: whether it is the last of ``expected``. It then sees what they wrote, and the counter is 0 again."""
    tl.debug_barrier()  # Triton 3.6 puts none between the stores of all warps and the release by one thread
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == expected - 1
    tl.store(counter_ptr, 0, mask=last)
    return last


@triton.jit
def spread(x):
    """The same numbers, neighbours in neighbouring threads: how stores to scattered places want them.

    Said once, for all that follows from ``x``. Triton would exchange each store's addresses, of 64 bits, and its mask.
    """
    return tl.gather(x, tl.arange(0, x.shape[0]), 0)


@triton.jit
def row_products(x, y):
    """x y^T of two tiles of rows, to the precision of float32 where they are float32."""
    return tl.dot(x, tl.trans(y), input_precision="ieee" if tl.target_info.is_hip() else "tf32x3")


@triton.jit
def load_rows(
    x_ptr,
    x_offs,  # [BLOCK] int64, where each row starts
    cos_ptr,  # None = leave the rows as they are
    sin_ptr,
    rope_offs,  # [BLOCK] int64, where each row's table starts
    ok,  # [BLOCK] bool
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Load [BLOCK, BLOCK_D] rows, zeros where not ok; undo rotate-half RoPE in float32 if tables are given."""
    offs_d = tl.arange(0, BLOCK_D)
    mask = ok[:, None] & (offs_d < D)[None, :]
    x = tl.load(x_ptr + x_offs[:, None] + offs_d[None, :], mask=mask, other=0.0)
    if cos_ptr is not None:
        other_half = (offs_d + D // 2) % D  # read again (from L1) rather than exchanged between threads
        y = tl.load(x_ptr + x_offs[:, None] + other_half[None, :], mask=mask, other=0.0).to(tl.float32)
        y = tl.where((offs_d < D // 2)[None, :], y, -y)
        cos = tl.load(cos_ptr + rope_offs[:, None] + offs_d[None, :], mask=mask, other=1.0).to(tl.float32)
        sin = tl.load(sin_ptr + rope_offs[:, None] + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
        x = (x.to(tl.float32) * cos + y * sin) / (cos * cos + sin * sin)
    return x.to(DTYPE)
