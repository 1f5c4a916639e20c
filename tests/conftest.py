"""Shared by all tests: the interpreter switch, NaN in uninitialised tensors, the device, and GPU-only tests."""

import inspect
import os

import pytest
import torch

HAS_CUDA = torch.cuda.is_available()
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # workers that each spin up all cores wait for one another most of the time
if not HAS_CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before the first `import triton`


def pytest_collection_modifyitems(config, items):
    """Deselect tests that need a GPU where there is none."""
    needs_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if needs_gpu and not HAS_CUDA:
        config.hook.pytest_deselected(items=needs_gpu)
        items[:] = [item for item in items if item not in needs_gpu]


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter():
    """Triton's interpreter looks through all of triton.language at every call of a device function; here it does so once."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    names = {}

    def patch_builtin(package, builder, scope):
        if package not in names:
            names[package] = [name for name, x in inspect.getmembers(package) if is_builtin(x)]
        for name in names[package]:
            if is_builtin(member := getattr(package, name)):
                interpreter._patch_attr(package, name, member, builder, scope)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_builtin", patch_builtin)
        yield


@pytest.fixture
def device():
    return torch.device("cuda" if HAS_CUDA else "cpu")


@pytest.fixture(autouse=True)
def nan_in_empty_tensors():
    """torch.empty returns NaN, so a kernel that forgets to write part of its output fails."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
