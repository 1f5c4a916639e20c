"""The launches that compact caches in place: in 16-byte pieces, with a barrier before they overwrite.

test_resources.py compiles each of them. Run in a process of its own: TRITON_INTERPRET=0 python -m pytest tests/compile.
"""

import re

import pytest
import torch
import triton

from helpers import offline

if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter cannot compile; run with TRITON_INTERPRET=0", allow_module_level=True)

ARCHS = [80, 90, 100]
PIECE = re.compile(r"\b(ld\.global|bar\.sync|st\.global)\S*")


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def positions(*shape):
    return meta(*shape, dtype=torch.int64)


def compact(*caches, K=256):
    from vlmprune.triton_kernels.compact_kv import compact_kv

    return lambda: compact_kv(caches, positions(caches[0].shape[0], K))


def gather(S):
    from vlmprune.triton_kernels.gather_tokens import gather_tokens

    return lambda: gather_tokens([meta(1, 32, S, 128), meta(1, S, 4096), positions(1, S)], positions(1, 256))


LAUNCHES = {
    "compact 64 caches": compact(*(meta(1, 32, 640, 128) for _ in range(64))),
    "compact fp32 batch of 2": compact(
        *(meta(2, 4, 4160, 128, dtype=torch.float32) for _ in range(4)), K=1088
    ),
    "compact mixed": compact(
        meta(2, 8, 577, 80), meta(2, 577, 96), meta(2, 8, 601, 80, dtype=torch.float8_e4m3fn)
    ),
    "compact, all ones": compact(meta(1, 1, 1, 1), meta(1, 1, 1), K=1),
}


@pytest.mark.parametrize("arch", ARCHS, ids="sm_{}".format)
def test_a_barrier_separates_reads_from_writes(arch):
    """In program order the one loop is: positions and rows are read, a barrier, rows are written; 16 bytes a piece."""
    (kernel,) = offline.compile_launches(LAUNCHES["compact 64 caches"], arch)
    pieces = [match[0] for match in PIECE.finditer(kernel.ptx)]
    kinds = [piece.split(".")[0] for piece in pieces]
    barrier, first_write = kinds.index("bar"), kinds.index("st")
    last_barrier, last_read = (len(kinds) - 1 - kinds[::-1].index(kind) for kind in ("bar", "ld"))
    assert last_read < last_barrier < first_write and barrier >= kinds.index("ld")
    assert kinds[first_write:] == ["st"] * (len(kinds) - first_write)
    assert all(".v4" in piece for piece in pieces[first_write:])
    assert sum(piece.startswith("ld.global.v4") for piece in pieces) == len(pieces) - first_write


@pytest.mark.parametrize(
    "launch", [lambda S: compact(meta(1, 32, S, 128)), gather], ids=["compact", "gather"]
)
def test_one_kernel_serves_every_length(launch):
    """A prompt of another length compiles nothing."""
    ((one,), (other,)) = (offline.compile_launches(launch(S), 90) for S in (640, 641))
    assert one.ptx == other.ptx
