"""Compile what a launcher would launch, for a GPU that is not there, and read the resources off the cubin.

A stub driver answers Triton's questions about the device, and every launch is turned into a compilation: so the
specialisation, tiles and warps are those of a real call. Nothing runs; the tensors are on the meta device.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED_LIMIT = {80: 166912, 90: 232448, 100: 232448}  # bytes one block may use (CUDA programming guide)


@dataclass(frozen=True)
class Compiled:
    """One kernel, compiled for one architecture."""

    name: str
    arch: int
    warps: int
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int
    ptx: str

    def summary(self):
        """One line for a failing test or a table."""
        spills = f"{self.spill_stores}/{self.spill_loads} spill bytes"
        return f"{self.name} sm_{self.arch}: {self.warps} warps, {self.registers} registers, {spills}, {self.shared} shared"


class _StubDriver:
    """What JITFunction.run asks of a driver before it launches."""

    def __init__(self, arch):
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_current_target(self):
        return self.target

    def get_active_torch_device(self):
        return torch.device("meta")


@contextlib.contextmanager
def compiling(arch):
    """Inside, a kernel launch compiles and adds its CompiledKernel to the list this yields."""
    compiled, run, active = [], JITFunction.run, driver._active

    def record(self, *args, grid, warmup, **kwargs):
        compiled.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    JITFunction.run = record
    driver.set_active(_StubDriver(arch))
    _forget_kernels()
    try:
        yield compiled
    finally:
        JITFunction.run = run
        driver._active = active
        _forget_kernels()


def _forget_kernels():
    """Empty the caches: they go by device number, and every stub is device 0."""
    for kernel in kernels():
        kernel.device_caches.clear()


def compile_launches(launch, arch):
    """Call ``launch()`` and return a Compiled for each kernel it would have launched."""
    with compiling(arch) as compiled:
        launch()
    return [_inspect(kernel, arch) for kernel in compiled]


def kernels():
    """Every jitted function of the package's kernel files."""
    from vlmprune.triton_kernels import gather_tokens, prune_tokens, received_attention, row_lse, select_topk

    for module in (gather_tokens, prune_tokens, received_attention, row_lse, select_topk):
        for value in vars(module).values():
            if isinstance(value, JITFunction):
                yield value


def _inspect(kernel, arch):
    ptx, cubin = kernel.asm["ptx"], kernel.asm["cubin"]
    registers, stack = _resources(cubin)
    stores, loads = _spills(ptx, arch)
    meta = kernel.metadata
    return Compiled(meta.name, arch, meta.num_warps, registers, stack, stores, loads, meta.shared, ptx)


def _tool(name, data, *arguments):
    """Run a tool of the wheel on a temporary file."""
    with tempfile.NamedTemporaryFile(suffix=".bin") as f:
        f.write(data)
        f.flush()
        command = [str(TOOLS / name), *arguments, f.name]
        return subprocess.run(command, capture_output=True, text=True, check=False)


def _resources(cubin):
    found = re.search(r"REG:(\d+) STACK:(\d+)", _tool("cuobjdump", cubin, "-res-usage").stdout)
    return tuple(map(int, found.groups()))


def _spills(ptx, arch):
    """Spill bytes: the stack alone does not tell. The first assembler that knows this PTX version answers."""
    gpu = f"sm_{arch}a" if arch >= 90 else f"sm_{arch}"
    errors = []
    for assembler in ("ptxas", "ptxas-blackwell"):
        result = _tool(assembler, ptx.encode(), "-v", f"--gpu-name={gpu}", "-o", "/dev/null")
        found = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", result.stderr)
        if result.returncode == 0 and found:
            return tuple(map(int, found.groups()))
        errors.append(result.stderr)
    raise RuntimeError("\n".join(errors))
