"""Shared by all tests: the interpreter switch, NaN in uninitialised tensors, the device, and GPU-only tests."""

import dataclasses
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
    """Spare Triton's interpreter two pieces of work that have no effect: together four tenths of its time."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    import triton.language as tl
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    patch_language = interpreter._patch_lang

    def patch_once(function):
        """At each call of a device function it patches triton.language again, under a kernel that has done so."""
        modules = [m for m in (tl, tl.core) if any(m is value for value in function.__globals__.values())]
        if any(is_builtin(module.load) for module in modules):
            return patch_language(function)
        return interpreter._LangPatchScope()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", patch_once)
        options = interpreter.interpreter_builder.options
        if not options.debug:  # it computes every integer sum twice, and asserts nothing
            unchecked = dataclasses.replace(options, sanitize_overflow=False)
            patch.setattr(interpreter.interpreter_builder, "options", unchecked)
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
