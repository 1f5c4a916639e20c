"""Kernels compiled beforehand are found by another build of the same Triton, and by no other version.

Run in a process of its own: TRITON_INTERPRET=0 python -m pytest tests/compile.
"""

from types import SimpleNamespace

import pytest
import torch
import triton
from gpu_day import kit
from micro.cases import CASES
from micro.shapes import TINY, Setting
from micro.stub import launching
from triton import knobs
from triton.runtime import cache

if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter does not compile; run with TRITON_INTERPRET=0", allow_module_level=True)

from gpu_day import pack

GATHER = next(case for case in CASES if case.name == "gather_tokens")


@pytest.fixture
def found(tmp_path, monkeypatch):
    """Whether each kernel was found in the cache, in a cache of its own and after the process has forgotten all."""
    from vlmprune.triton_kernels.gather_tokens import _gather_tokens_kernel

    hits = []
    monkeypatch.setattr("micro.sweep.CASES", (GATHER,))
    with knobs.cache.scope(), knobs.compilation.scope():
        knobs.cache.dir = str(tmp_path / "cache")
        knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
        _gather_tokens_kernel.device_caches.clear()
        yield SimpleNamespace(hits=hits, forget=_gather_tokens_kernel.device_caches.clear)
    _gather_tokens_kernel.device_caches.clear()


def launch():
    with launching():
        GATHER.run(pack.EmptyInputs(Setting(TINY, torch.bfloat16, 1, torch.device("cpu"))))


def test_kernels_are_found_by_another_build_of_triton(found, tmp_path, monkeypatch):
    kernels = pack.compiled(TINY)
    assert found.hits == [False]
    (files,) = kernels.values()
    assert sorted(files) == ["_gather_tokens_kernel.cubin", "_gather_tokens_kernel.json"]
    store = kit.KernelStore(tmp_path / "kernels")
    store.write(kernels)

    monkeypatch.setattr(cache, "triton_key", lambda: "another build")
    knobs.cache.dir = str(tmp_path / "fresh")
    found.forget()
    assert store.lay_out() == f"1 kernels were compiled beforehand, with Triton {triton.__version__}"
    launch()
    assert found.hits == [False, True]


def test_kernels_of_another_version_are_left_alone(found, tmp_path, monkeypatch):
    store = kit.KernelStore(tmp_path / "kernels")
    assert store.lay_out() == "no kernels were compiled beforehand: each is when it is first met"
    store.write(pack.compiled(TINY))
    monkeypatch.setattr(triton, "__version__", "3.5.0")
    assert store.lay_out().endswith("here is 3.5.0: they are compiled again")
