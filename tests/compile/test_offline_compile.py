"""The launches that score, select, gather and prune, at the shapes of LLaVA-1.5 and more, and what their code must hold.

test_resources.py compiles each of them. Run in a process of its own: TRITON_INTERPRET=0 python -m pytest tests/compile.
"""

import itertools
import re

import pytest
import torch
import triton

from helpers import offline
from vlmprune.ops.prune_tokens import checked
from vlmprune.ops.scoring import Scoring
from vlmprune.ops.selection import Selection

if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter cannot compile; run with TRITON_INTERPRET=0", allow_module_level=True)


ARCHS = [90, *(pytest.param(arch, marks=pytest.mark.slow) for arch in (80, 100))]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def meta(*shape, dtype=BF16):
    return torch.empty(shape, dtype=dtype, device="meta")


def positions(*shape):
    return meta(*shape, dtype=torch.int64)


def score(
    dtype, D, R, H=32, Hkv=32, S=640, N=576, mask=False, rope=False, lse=False, pairs=False, **reduction
):
    """A launch of received_attention: LLaVA-1.5's 576 visual tokens in a prompt of 640 unless told otherwise."""
    from vlmprune.triton_kernels.received_attention import received_attention

    query, key = meta(1, H, S, D, dtype=dtype), meta(1, Hkv, S, D, dtype=dtype)
    scoring = Scoring.checked(
        query,
        key,
        rows=positions(1, R),
        columns=positions(1, N),
        key_mask=meta(1, S, dtype=torch.bool) if mask else None,
        lse=meta(1, H, S, dtype=FP32) if lse else None,
        row_weight=meta(1, R, dtype=FP32) if mask else None,
        pair_weight=meta(1, R, N, dtype=FP32) if pairs else None,
        rope=(meta(1, S, D, dtype=dtype),) * 2 if rope else None,
        **reduction,
    )
    return lambda: received_attention(scoring)


def select(N, dtype, coded, keep=None):
    from vlmprune.triton_kernels.select_topk import select_topk

    keep = positions(2) if coded else N // 3 if keep is None else keep
    code = meta(2, N, dtype=torch.int8) if coded else None
    return lambda: select_topk(meta(2, N, dtype=dtype), keep, code, N if coded else keep)


def gather(n_caches):
    from vlmprune.triton_kernels.gather_tokens import gather_tokens

    caches = [meta(1, 32, 640, 128) for _ in range(n_caches)]
    others = [meta(1, 640, 4096), positions(1, 640), meta(1, 640, 128), meta(1, 640, dtype=torch.bool)]
    return lambda: gather_tokens(others + caches, positions(1, 256))


def gather_one():
    from vlmprune.triton_kernels.gather_tokens import gather_tokens

    return lambda: gather_tokens([meta(1, 1), meta(1, 1, 1), meta(1, 1, 1, 1)], positions(1, 1))


def prune(
    dtype=FP16,
    R=1,
    H=32,
    Hkv=32,
    S=640,
    N=576,
    B=1,
    D=128,
    lse=False,
    rope=False,
    packed=False,
    pairs=False,
    selection=None,
    **reduction,
):
    """A launch of prune_tokens, LLaVA-1.5's unless told otherwise: 128 of its 576 visual tokens stay."""
    from vlmprune.triton_kernels.prune_tokens import prune_tokens

    rows = 1 if packed else B
    query, key = meta(rows, H, S, D, dtype=dtype), meta(rows, Hkv, S, D, dtype=dtype)
    scoring = Scoring.checked(
        query,
        key,
        rows=positions(B, R),
        columns=positions(B, N),
        key_mask=None if packed else meta(B, S, dtype=torch.bool),
        lse=meta(rows, H, S, dtype=FP32) if lse else None,
        row_weight=meta(B, R, dtype=FP32) if pairs else None,
        pair_weight=meta(B, R, N, dtype=FP32) if pairs else None,
        scale=0.1,
        rope=(meta(1, S, D, dtype=dtype),) * 2 if rope else None,
        cu_seqlens=meta(B + 1, dtype=torch.int32) if packed else None,
        **reduction,
    )
    keep = positions(B) if packed else min(128, N)
    how = Selection.checked(query, B, N, S, packed, **selection or dict(keep=keep))
    return lambda: prune_tokens([key], how, scoring)


def prune_by_tower(R=1, P=576, S=640):
    """A launch of prune_tokens by what the patches of a vision tower's CLIP receive, from CLS or (``R > 1``) from all."""
    from vlmprune.triton_kernels.prune_tokens import prune_tokens

    query, key = (meta(1, 16, P + (R == 1), 64, dtype=FP16) for _ in range(2))
    tensors, lists = [meta(1, S, 4096, dtype=FP16)], dict(rows=positions(1, R), columns=positions(1, P))
    how = dict(at=positions(1, P), at_mask=meta(1, S, dtype=torch.bool), keep=128)
    tensors, selection, scoring = checked(query, key, tensors, causal=False, **lists, **how)
    return lambda: prune_tokens(tensors, selection, scoring)


def prune_by(N=576, B=1, S=None, **selection):
    """A launch of prune_scored, of all positions unless there are more."""
    from vlmprune.triton_kernels.prune_tokens import prune_scored

    scores, S = meta(B, N, dtype=FP32), N if S is None else S
    how = Selection.checked(scores, B, N, S, **selection or dict(keep=N // 3))
    mask = meta(B, S, dtype=torch.bool)
    return lambda: prune_scored([meta(B, S, 1024)], how, scores, positions(B, N), mask, S)


def every(B, N, G=5):
    """Every way to select at once."""
    lists = dict(keep=positions(B, G), segments=positions(B, G), code=meta(B, N, dtype=torch.int8))
    return lists | dict(newest=True, padding="left")


PARTS = dict(keep=positions(4, 3), segments=positions(4, 3))  # of a packed batch


LAUNCHES = {
    "score bf16 D=128 R=1": score(BF16, 128, 1),
    "score bf16 D=128 R=1 lse": score(BF16, 128, 1, lse=True),
    "score bf16 D=128 R=64 masked": score(BF16, 128, 64, mask=True),
    "score bf16 D=64 R=64 masked": score(BF16, 64, 64, mask=True),
    "score bf16 D=256 R=1 masked": score(BF16, 256, 1, mask=True),
    "score fp16 D=128 R=64 max columns": score(FP16, 128, 64, row_reduce="max", normalize="columns"),
    "score fp16 D=64 R=64 none": score(FP16, 64, 64, normalize="none", head_reduce="none"),
    "score fp32 D=128 R=1": score(FP32, 128, 1),
    "score fp32 D=128 R=64": score(FP32, 128, 64),
    "score fp32 D=64 R=64 masked": score(FP32, 64, 64, mask=True),
    "score bf16 D=128 R=1 rope": score(BF16, 128, 1, rope=True),
    "score bf16 D=128 R=64 rope": score(BF16, 128, 64, rope=True, mask=True),
    "score fp16 D=64 R=64 rope": score(FP16, 64, 64, rope=True),
    "score fp32 D=128 R=64 rope": score(FP32, 128, 64, rope=True),
    "score bf16 D=80 R=577 vision": score(BF16, 80, 577, H=16, Hkv=16, S=577, mask=True),
    "score bf16 D=128 GQA R=4": score(BF16, 128, 4, H=20, Hkv=4),
    "score bf16 D=128 GQA 4k": score(BF16, 128, 1, H=28, Hkv=4, S=4160, N=4096),
    "score bf16 D=128 R=64 pairs": score(BF16, 128, 64, mask=True, pairs=True),
    "score fp16 D=64 R=64 pairs, top heads max": score(
        FP16, 64, 64, pairs=True, head_reduce="max", top_heads=5
    ),
    "score bf16 D=128 R=64 rope pairs, top heads": score(BF16, 128, 64, rope=True, pairs=True, top_heads=14),
    "score bf16 D=128 R=1 top heads of 128": score(BF16, 128, 1, H=128, Hkv=8, top_heads=14),
    "select fp32 N=576": select(576, FP32, False),
    "select bf16 N=576 coded": select(576, BF16, True),
    "select fp32 N=2880": select(2880, FP32, False),
    "select fp32 N=2880 coded": select(2880, FP32, True),
    "select fp32 N=16384": select(16384, FP32, False),
    "select bf16 N=65536 coded": select(65536, BF16, True),
    "gather, no caches": gather(0),
    "gather, 60 caches": gather(60),
    "prune": prune(),
    "prune bf16 lse": prune(BF16, lse=True),
    "prune bf16 96": prune(BF16, S=96, N=64),
    "prune bf16 R=64 lse max": prune(BF16, 64, lse=True, head_reduce="max", row_reduce="max"),
    "prune bf16 2944": prune(BF16, S=2944, N=2880, lse=True),
    "prune bf16 2944 R=64": prune(BF16, 64, S=2944, N=2880),
    "prune bf16 2944 R=64 rope": prune(BF16, 64, S=2944, N=2880, rope=True),
    "prune fp32 R=64": prune(FP32, 64),
    "prune bf16 GQA 4k": prune(BF16, H=28, Hkv=4, S=4096, N=4032, lse=True),
    "prune bf16 GQA 32k": prune(BF16, H=28, Hkv=4, S=32832, N=32768, lse=True),
    "prune bf16 GQA 16k": prune(BF16, H=28, Hkv=4, S=16448, N=16384, lse=True),
    "prune bf16 packed": prune(BF16, B=4, S=2560, packed=True),
    "prune bf16 packed 16k": prune(BF16, R=64, B=4, S=16384, packed=True),
    "prune bf16 packed, segments": prune(BF16, B=4, S=2560, packed=True, selection=PARTS),
    "prune bf16, every way": prune(BF16, B=2, selection=every(2, 576)),
    "prune bf16 2944, every way": prune(BF16, S=2944, N=2880, selection=every(1, 2880)),
    "prune bf16 2944 R=64, every way": prune(BF16, 64, S=2944, N=2880, selection=every(1, 2880)),
    "prune fp32 R=64, every way": prune(FP32, 64, selection=every(1, 576)),
    "prune bf16 GQA 16k, every way": prune(
        BF16, H=28, Hkv=4, S=16448, N=16384, lse=True, selection=every(1, 16384)
    ),
    "prune bf16 16k R=64 rope, every way": prune(
        BF16, 64, S=16448, N=16384, rope=True, selection=every(1, 16384)
    ),
    "prune fp16 16k R=64, pairs and top heads, every way": prune(
        FP16, 64, S=16448, N=16384, pairs=True, top_heads=14, selection=every(1, 16384)
    ),
    "prune bf16 16k D=256, every way": prune(BF16, D=256, S=16448, N=16384, selection=every(1, 16384)),
    "prune fp32 16k R=64": prune(FP32, 64, S=16448, N=16384),
    "prune bf16 16k R=64, every way": prune(BF16, 64, S=16448, N=16384, selection=every(1, 16384)),
    "prune bf16 R=12, pairs and top heads": prune(BF16, 12, lse=True, pairs=True, top_heads=14),
    "prune bf16 GQA R=64, pairs and top heads": prune(BF16, 64, H=28, Hkv=4, pairs=True, top_heads=14),
    "prune bf16 packed R=64, pairs and top heads": prune(
        BF16, 64, B=4, S=2560, packed=True, pairs=True, top_heads=14
    ),
    "prune fp32 R=64, pairs and top heads": prune(
        FP32, 64, pairs=True, top_heads=14, selection=every(1, 576)
    ),
    "prune by CLS": prune_by_tower(),
    "prune by all patches": prune_by_tower(R=576),
    "prune by scores 576": prune_by(),
    "prune by scores 576, every way": prune_by(B=2, S=640, **every(2, 576)),
    "prune by scores 2880": prune_by(2880),
    "prune by scores 16384": prune_by(16384),
    "prune by scores 40000": prune_by(40_000),
    "prune by scores 2880, every way": prune_by(2880, **every(1, 2880)),
    # Triton turns an argument of 1 into a constant of another type
    "score, all ones": score(BF16, 8, 1, H=1, Hkv=1, S=1, N=1, mask=True, normalize="columns"),
    "score, one head, split keys": score(FP16, 64, 1, H=1, Hkv=1, S=1280, N=1),
    "select 1 of 1": select(1, FP32, False, keep=1),
    "select 1 of 1 coded": select(1, FP32, True),
    "prune by scores 1 of 1": prune_by(1, keep=1),
    "select none": select(576, FP32, False, keep=0),
    "gather, all ones": gather_one(),
}


@pytest.mark.parametrize("arch", ARCHS, ids="sm_{}".format)
def test_big_tensors_move_in_16_byte_pieces(arch):
    """Alignment survives the choice of a pointer from the launch's tuple."""
    (kernel,) = offline.compile_launches(gather(60), arch)
    assert "ld.global.v4" in kernel.ptx and "st.global.v4" in kernel.ptx


@pytest.mark.parametrize("arch", ARCHS, ids="sm_{}".format)
@pytest.mark.parametrize(
    "name, kernel, atomics",
    [
        ("prune", "_score_select_kernel", 2),  # parts of a tile, tiles of a sample
        ("prune bf16 2944, every way", "_score_select_kernel", 2),
        ("prune bf16 packed", "_score_select_kernel", 2),
        ("prune bf16 GQA 4k", "_score_select_kernel", 2),
        ("prune bf16 R=12, pairs and top heads", "_score_select_kernel", 1),
        ("score, one head, split keys", "_row_lse_kernel", 1),
    ],
)
def test_a_barrier_comes_before_every_atomic(name, kernel, atomics, arch):
    """Whoever counts itself in has its whole block's stores behind it, in the machine code too."""
    counts = {
        k.name: offline.unguarded_atomics(offline.sass(k))
        for k in offline.compile_launches(LAUNCHES[name], arch)
        if offline.global_atomics(k)
    }
    assert counts[kernel] == (atomics, 0)
    assert all(unguarded == 0 for _, unguarded in counts.values())


@pytest.mark.parametrize("name", ["score, one head, split keys", "prune bf16 GQA 16k", "prune bf16 GQA 32k"])
def test_nothing_is_counted_where_nothing_is_joined(name):
    """A single KV head, or as many tiles as a GPU takes at once: each program finishes its own columns."""
    kernels = {k.name: k for k in offline.compile_launches(LAUNCHES[name], 90)}
    assert offline.global_atomics(kernels["_score_select_kernel"]) == []


def test_prompts_of_other_lengths_need_no_other_kernel():
    """Neither the length nor how many rows score or tokens stay may make a server compile anew at every prompt."""
    first, second = (
        offline.compile_launches(prune(S=S, N=N, R=R, selection=dict(keep=keep)), 90)
        for S, N, R, keep in ((650, 576, 5, 128), (901, 577, 7, 1))
    )
    assert [k.name for k in first] == ["_row_lse_kernel", "_score_select_kernel", "_gather_tokens_kernel"]
    assert [k.ptx for k in first] == [k.ptx for k in second]


def test_the_check_sees_a_missing_barrier():
    atomic = ["MEMBAR.ALL.GPU", "ATOMG.E.ADD.STRONG.GPU"]
    assert offline.unguarded_atomics(["BAR.SYNC.DEFER_BLOCKING", "STG.E", *atomic]) == (1, 1)
    assert offline.unguarded_atomics(["STG.E.128", "BAR.SYNC.DEFER_BLOCKING", "LDG.E", *atomic]) == (1, 0)
    assert offline.unguarded_atomics(["STG.E", "BAR.SYNC", "REDG.E.ADD.S32", "ST.E", "RED.E.ADD"]) == (2, 1)
    atomic = "atom.global.gpu.acq_rel.add.u32"
    assert offline.unannounced(f"bar.sync 0; st.global.b32; {atomic}") == 1
    assert offline.unannounced(f"st.global.b32; bar.sync 0; ld.global.b32; {atomic}; atom.shared.add") == 0


@pytest.mark.parametrize(
    "name",
    ["prune bf16 packed", "prune bf16 packed, segments", "prune bf16 packed R=64, pairs and top heads"],
)
def test_barriers_separate_the_steps_of_a_selection(name):
    """Each reads what other threads wrote in the one before: keys, marks. Reads of the workspace are these loads."""
    (kernel,) = (k for k in offline.compile_launches(LAUNCHES[name], 90) if k.name == "_score_select_kernel")
    after = kernel.ptx[kernel.ptx.rindex("atom.global") :].partition("st.global")[
        2
    ]  # which resets the counter
    steps = [s[:9] for s in re.findall(r"bar\.sync|st\.global|ld\.global\.(?:cg|v4\.b32)", after)]
    assert ("st.global", "ld.global") not in itertools.pairwise(steps)
    assert steps.count("st.global") >= 10
