"""Shared by all tests: the interpreter switch, NaN in uninitialised tensors, the device, and GPU-only tests."""

import dataclasses
import math
import os
from importlib.metadata import version
from importlib.util import find_spec

import pytest
import torch

from helpers import device as there
from helpers import pretended
from helpers.lost_device import pytest_runtest_makereport  # noqa: F401

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # workers that each spin up all cores wait for one another most of the time
DEVICE = pytest.StashKey[str]()
SLOW = "benchmarks", "csrc", "compile", "models", "training"


def pytest_addoption(parser):
    said = (
        "where tests run: models and policies on the CPU if not said, others on CUDA if there is one; pretend: "
        "models and policies on a device that checks that nothing mixes with the CPU"
    )
    parser.addoption("--device", choices=there.CHOICES, help=said)
    parser.addoption("--one-case", action="store_true", help="of every test the first case that can run")


def pytest_configure(config):
    """The device, and before the first `import triton` whether kernels are interpreted."""
    config.stash[DEVICE] = there.chosen(config.getoption("device"))
    if config.stash[DEVICE] != "cuda":
        os.environ.setdefault("TRITON_INTERPRET", "1")
    elif config.getoption("device") and os.environ.get("TRITON_INTERPRET") == "1":
        raise pytest.UsageError("--device cuda: expected TRITON_INTERPRET=0 or unset, got 1")
    else:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else its sums depend on the stream


def versions():
    names = ("transformers", "triton", "torch", "numpy")
    return ", ".join(f"{name} {version(name)}" for name in names if find_spec(name))


def pytest_report_header():
    return versions()


def pytest_terminal_summary(terminalreporter, config):
    """What ran on a pretended device; and a failure says under which versions, once more where one looks for it."""
    if config.getoption("device") == "pretend":
        terminalreporter.write_line(pretended.shares(terminalreporter.stats.get("passed", [])))
    if terminalreporter.stats.get("failed") or terminalreporter.stats.get("error"):
        terminalreporter.write_line(f"with {versions()}", red=True)


def pytest_collection_modifyitems(config, items):
    """Deselect tests that need a GPU where there is none; a slow one lies where `make test-slow` looks for it."""
    slow = (item for item in items if item.get_closest_marker("slow"))
    stray = [item.nodeid for item in slow if item.path.parent.name not in SLOW]
    if stray:
        raise pytest.UsageError(f"slow tests belong into one of tests/ {', '.join(SLOW)}, got {stray[0]}")
    leave_out = {"cuda": ("cpu",), "pretend": ("cpu", "real")}.get(config.getoption("device"), ())
    for item in items:
        for marker in filter(None, map(item.get_closest_marker, leave_out)):
            item.add_marker(pytest.mark.skip(reason=f"{marker.name}: {marker.args[0]}"))
    left_out = {item for item in items if item.get_closest_marker("gpu") and config.stash[DEVICE] != "cuda"}
    if config.getoption("one_case"):
        can_run = [item for item in items if item not in left_out and not item.get_closest_marker("skip")]
        first = {item.nodeid.partition("[")[0]: item for item in reversed(can_run)}
        left_out |= {*items} - {*first.values()}
    if left_out:
        config.hook.pytest_deselected(items=[*left_out])
        items[:] = [item for item in items if item not in left_out]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Note how many operations a test ran on a pretended device."""
    counts = item.funcargs.get("tensors_on_the_device")
    before = 0 if counts is None else counts.count
    try:
        return (yield)
    finally:
        if counts is not None:
            item.user_properties.append((counts.NOTE, counts.count - before))


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter():
    """Halve the time of Triton's interpreter, which spends it on its own bookkeeping; other Tritons run as they are."""
    if os.environ.get("TRITON_INTERPRET") != "1" or version("triton") not in ("3.6.0", "3.9.0"):
        yield
        return
    from triton.runtime import interpreter

    with pytest.MonkeyPatch.context() as patch:
        options = interpreter.interpreter_builder.options
        if not options.debug:  # it computes every integer sum twice, and asserts nothing
            unchecked = dataclasses.replace(options, sanitize_overflow=False)
            patch.setattr(interpreter.interpreter_builder, "options", unchecked)
        patch_language_once(patch, interpreter)
        remember_types(patch, interpreter)
        yield


def patch_language_once(patch, interpreter):
    """At each call of a device function it patches triton.language again, under a kernel that has done so."""
    import triton.language as tl

    patch_language = interpreter._patch_lang

    def once(function):
        modules = [m for m in (tl, tl.core) if any(m is value for value in function.__globals__.values())]
        if any(tl.core.is_builtin(module.load) for module in modules):
            return patch_language(function)
        return interpreter._LangPatchScope()

    patch.setattr(interpreter, "_patch_lang", once)


def remember_types(patch, interpreter):
    """Every operation makes its type, shape and numpy dtype anew; there are few different ones."""
    from triton.language import core

    make_type, numpy_type = core.block_type.__init__, interpreter._get_np_dtype
    types, shapes, numpy_types = {}, {}, {}

    def init_type(self, element_ty, shape):
        key = element_ty.name, *map(core._unwrap_if_constexpr, shape)
        if key not in types:
            make_type(self, element_ty, shape)
            types[key] = dict(vars(self))
        vars(self).update(types[key], element_ty=element_ty)

    def init_tensor(self, handle, type):
        key = tuple(type.shape) if type.is_block() else ()
        if key not in shapes:
            shapes[key] = core.tuple([core.constexpr(n) for n in key]), core.constexpr(math.prod(key))
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shapes[key]

    def get_numpy_type(type):
        if (name := type.scalar.name) not in numpy_types:
            numpy_types[name] = numpy_type(type)
        return numpy_types[name]

    patch.setattr(core.block_type, "__init__", init_type)
    patch.setattr(core.tensor, "__init__", init_tensor)
    patch.setattr(interpreter, "_get_np_dtype", get_numpy_type)


@pytest.fixture(scope="session")
def device(pytestconfig):
    return torch.device("cuda" if pytestconfig.stash[DEVICE] == "cuda" else "cpu")


@pytest.fixture(scope="module", autouse=True)
def tensors_on_the_device(request, pytestconfig):
    """With --device the tensors of models and policies lie there; yields what a pretended device counts."""
    asked = pytestconfig.getoption("device")
    if asked in (None, "cpu") or request.path.parent.name not in there.FOLDERS:
        yield None
    elif asked == "cuda":
        with there.exact(), there.tensors_on(torch.device("cuda", 0), request.module):
            yield None
    else:
        with there.tensors_on(pretended.DEVICE, request.module), pretended.pretending() as counts:
            yield counts


@pytest.fixture(autouse=True)
def nan_in_empty_tensors():
    """torch.empty returns NaN, so a kernel that forgets to write part of its output fails."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
