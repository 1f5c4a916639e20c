"""Launches through Triton's own launcher, in C, without a GPU: what would reach the CUDA driver is noted instead.

Kernels are compiled for sm_90 and take tensors on the CPU; the C file beside this one stands in for libcuda.so.1. Needs
TRITON_INTERPRET=0, as the interpreter has no launcher.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import triton.backends.nvidia.driver as nvidia
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from helpers.launching_ops import launching_ops

SOURCE = Path(__file__).with_suffix(".c")
STREAM = 7  # the current one, so that none can pass for it by accident
FORMATS = {"i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "fp16": "e", "fp32": "f", "fp64": "d"}
FORMATS |= {
    "u1": "B",
    "u8": "B",
    "u16": "H",
    "u32": "I",
    "u64": "Q",
    "f32": "f",
    "bf16": "H",
}  # bf16: its bits


class Launch(NamedTuple):
    """What the driver was asked to start.

    Attributes:
        name: of the kernel.
        function: the handle of its compiled form; equal where types, constants, alignment and warps are.
        grid: blocks along x, y and z.
        block: threads of a block.
        shared: bytes of dynamic shared memory.
        stream: handle of the stream.
        attributes: what else the launch asks for, as numbers of CUlaunchAttributeID.
        pointers: by parameter; of those in a tuple: ``name.0``, ``name.1``. What was compiled in as a constant is not here.
        scalars: likewise.
    """

    name: str
    function: int
    grid: tuple[int, int, int]
    block: int
    shared: int
    stream: int
    attributes: tuple[int, ...]
    pointers: dict[str, int]
    scalars: dict[str, int | float]

    def without_pointers(self) -> Launch:
        """To compare launches on different tensors."""
        return self._replace(pointers=dict.fromkeys(self.pointers, 0))


class Recorder:
    """What was launched."""

    def __init__(self, library: Any, kernels: dict[int, tuple[str, dict[str, str]]]) -> None:
        self._library, self._kernels = library, kernels

    def take(self) -> list[Launch]:
        """The launches since this was last called, in order."""
        noted = [self._read(i) for i in range(self._library.recorder_count())]
        self._library.recorder_clear()
        return noted

    def _read(self, i: int) -> Launch:
        raw = self._library.recorder_launch(i).contents
        name, types = self._kernels[raw.function]
        pointers, scalars = {}, {}
        for (parameter, kind), bits in zip(types.items(), raw.parameters, strict=False):
            if kind.startswith("*"):
                pointers[parameter] = bits
            else:
                (scalars[parameter],) = struct.unpack_from(FORMATS[kind], bits.to_bytes(8, "little"))
        attributes = tuple(raw.attributes[: raw.n_attributes])
        head = (name, raw.function, tuple(raw.grid), raw.block, raw.shared, raw.stream, attributes)
        return Launch(*head, pointers, scalars)


class _Raw(ctypes.Structure):
    """``Launch`` of the C file."""

    _fields_ = (
        ("function", ctypes.c_uint64),
        ("stream", ctypes.c_uint64),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32),
        ("shared", ctypes.c_uint32),
        ("n_attributes", ctypes.c_uint32),
        ("attributes", ctypes.c_uint32 * 4),
        ("parameters", ctypes.c_uint64 * 512),
    )


class _Device(int):
    """Device 0, which passes for None, the index of tensors on the CPU.

    It is no other driver's device: Triton keeps compiled kernels by device, and those of another have another launcher.
    """

    def __eq__(self, other: object) -> bool:
        return other is self or other is None

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = object.__hash__


class _Driver:
    """NVIDIA's driver for Triton, but for PyTorch's answers, which has no GPU to speak of."""

    def __init__(self, library: Any, utils: Any) -> None:
        self._library, self._load, self._src = library, utils.load_binary, None
        self._device = _Device()
        self.kernels: dict[int, tuple[str, dict[str, str]]] = {}
        self._loaded: dict[Any, tuple[Any, ...]] = {}
        self.utils = SimpleNamespace(**{**vars(utils), "load_binary": self._load_binary})

    def launcher_cls(self, src: Any, metadata: Any) -> Any:
        self._src = src  # its binary is loaded next
        return nvidia.CudaLauncher(src, metadata)

    def _load_binary(self, name: str, *args: Any) -> tuple[Any, ...]:
        if (name, args) in self._loaded:  # Triton asks again as long as it has no module
            return self._loaded[name, args]
        _, function, *rest = self._load(name, *args)
        types = dict(_parameters(self._src.signature))
        sizes = [8 if kind.startswith("*") else struct.calcsize(FORMATS[kind]) for kind in types.values()]
        self._library.recorder_describe(function, bytes(sizes), len(sizes))
        self.kernels[function] = name, types
        # no module: else Triton asks the driver of that day to unload it
        self._loaded[name, args] = loaded = (None, function, *rest)
        return loaded

    def get_current_device(self) -> int:
        return self._device

    def get_current_stream(self, device: object = None) -> int:
        return STREAM

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def _parameters(signature: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(name, type) of the parameters that a compiled kernel has left."""
    for name, kind in signature.items():
        if isinstance(kind, tuple):
            yield from _parameters({f"{name}.{i}": inner for i, inner in enumerate(kind)})
        elif kind != "constexpr":
            yield name, kind


@cache
def _recorder() -> Any:
    """The library, built where Triton keeps what it builds, and loaded before anything asks for libcuda.so.1.

    Its path is part of what Triton's launchers are kept by, so it does not change from run to run.
    """
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")  # as Triton looks for one
    if compiler is None:
        pytest.skip("there is no C compiler")
    if _is_loaded("libcuda.so.1"):
        pytest.skip("this process has loaded a CUDA driver")
    source = SOURCE.read_bytes()
    path = Path(knobs.cache.dir) / "recorder" / hashlib.sha256(source).hexdigest()[:16] / "libcuda.so.1"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        own = path.with_suffix(f".{os.getpid()}")  # other workers may be at it
        flags = ["-O2", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", f"-I{nvidia.include_dirs[0]}"]
        subprocess.run([compiler, *flags, SOURCE, "-o", own], check=True)
        own.replace(path)
    library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    library.recorder_launch.restype = ctypes.POINTER(_Raw)
    library.recorder_describe.argtypes = (ctypes.c_uint64, ctypes.c_char_p, ctypes.c_int)
    library.path = path
    return library


def _is_loaded(library: str) -> bool:
    try:
        ctypes.CDLL(library, mode=os.RTLD_NOLOAD)
    except OSError:
        return False
    return True


@contextmanager
def recording_driver(*, ops: bool = False) -> Iterator[Recorder]:
    """Inside, kernels are launched onto a recorder, which this yields. Their outputs stay as they were allocated.

    Args:
        ops: whether vlmprune's ops launch, and their outputs are filled, as ``launching_ops`` says.
    """
    library, active = _recorder(), driver._active
    library.recorder_clear()
    with knobs.nvidia.scope(), launching_ops() if ops else nullcontext():
        knobs.nvidia.libcuda_path = str(library.path.parent)
        _forget_libraries()
        recording = _Driver(library, nvidia.CudaUtils())
        driver.set_active(recording)
        try:
            yield Recorder(library, recording.kernels)
        finally:
            driver._active = active
            _forget_libraries()


def _forget_libraries() -> None:
    """Where libcuda.so.1 is, Triton looks up once."""
    nvidia.libcuda_dirs.cache_clear()
    nvidia.library_dirs.cache_clear()
