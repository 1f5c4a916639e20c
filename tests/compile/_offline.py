"""Compile what a launcher would launch, for a GPU that is not there, and read the resources off the cubin.

A stub driver answers Triton's questions about the device, and every launch is turned into a compilation: so the
specialisation, tiles and warps are those of a real call. Nothing runs; the tensors are on the meta device.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.cache import get_cache_manager
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
    binary: bytes

    def summary(self):
        """One line for a failing test or a table."""
        spills = f"{self.spill_stores}/{self.spill_loads} spill bytes"
        return f"{self.name} sm_{self.arch}: {self.warps} warps, {self.registers} registers, {spills}, {self.shared} shared"


class _StubDriver:
    """What JITFunction.run asks of a driver before it launches."""

    def __init__(self, arch):
        self.target = GPUTarget("cuda", arch, 32) if isinstance(arch, int) else GPUTarget("hip", arch, 64)

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
    compiled, launched, run, active = [], [], JITFunction.run, driver._active

    def record(self, *args, grid, warmup, **kwargs):
        if not isinstance(arch, int):
            kwargs.pop("maxnreg", None)  # launchers leave it out where PyTorch is built for AMD
        launched.append(self)
        compiled.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    JITFunction.run = record
    driver.set_active(_StubDriver(arch))
    try:
        yield compiled
    finally:
        JITFunction.run = run
        driver._active = active
        for kernel in launched:
            kernel.device_caches.clear()  # they go by device number, and every stub is device 0


def compile_launches(launch, arch):
    """Call ``launch()`` and return a Compiled for each kernel it would have launched."""
    with compiling(arch) as compiled:
        launch()
    return [_inspect(kernel, arch) for kernel in compiled]


def compile_clean(launch, arch):
    """The same, each of them without a spill or an atomic on floats, and small enough for one block.

    Also proves that a launcher never waits for the device: a meta tensor has no value to wait for.
    """
    compiled = compile_launches(launch, arch)
    assert compiled
    for kernel in compiled:
        assert (kernel.spill_stores, kernel.spill_loads) == (0, 0), kernel.summary()
        assert kernel.shared <= SHARED_LIMIT[arch], kernel.summary()
        for atomic in global_atomics(kernel):
            assert re.search(r"\.[sub]32$", atomic), f"{kernel.name}: {atomic}, whose order decides the bits"
        assert unannounced(kernel.ptx) == 0, f"{kernel.name}: no barrier between its stores and its atomic"
    return compiled


def global_atomics(kernel):
    """Every atomic on global memory, as PTX names it."""
    return re.findall(r"\b(?:atom|red)\.(?!\S*shared)\S+", kernel.ptx)


def unannounced(ptx):
    """How many atomics on global memory no barrier of the block parts from the store before them; in SASS: below."""
    steps = re.findall(r"\b(bar\.sync|barrier\.sync|st\.global|(?:atom|red)\.(?!\S*shared))", ptx)
    atomics = [i for i, step in enumerate(steps) if step.startswith(("atom", "red"))]
    return sum(
        "bar" not in next((s[:3] for s in reversed(steps[:i]) if s[:3] in ("bar", "st.")), "")
        for i in atomics
    )


def sass(kernel):
    """Names of the machine instructions, in the order of the listing."""
    listing = _tool("cuobjdump", kernel.binary, "-sass").stdout
    return re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]+)", listing)


def unguarded_atomics(instructions):
    """(atomics on global memory, those that no barrier of the block parts from the store before them).

    Without it a block may announce its part while other warps still write theirs: what no interpreter can show.
    """
    atomics = [i for i, op in enumerate(instructions) if re.match(r"(ATOMG?|REDG?)\b", op)]
    unguarded = 0
    for i in atomics:
        before = [op for op in instructions[:i] if re.match(r"(STG|ST|BAR)\b", op)]
        unguarded += not before or not before[-1].startswith("BAR.SYNC")
    return len(atomics), unguarded


def meta(*shape, dtype=torch.bfloat16):
    """A tensor of no content, to launch with."""
    return torch.empty(shape, dtype=dtype, device="meta")


def _inspect(kernel, arch):
    meta, code = kernel.metadata, kernel.asm["ptx" if isinstance(arch, int) else "amdgcn"]
    binary = kernel.asm["cubin" if isinstance(arch, int) else "hsaco"]
    return Compiled(
        meta.name, arch, meta.num_warps, *_measured(kernel, code, arch), meta.shared, code, binary
    )


def _measured(kernel, code, arch):
    """Registers, stack, spill stores and loads; kept beside the binary in Triton's cache, as the tools take longer than it."""
    kept, name = get_cache_manager(kernel.hash), "resources.json"
    path = kept.get_file(name)
    if path is None:
        read = _resources(kernel.asm["cubin"]) + _spills(code, arch) if isinstance(arch, int) else _amd(code)
        path = kept.put(json.dumps(read), name, binary=False)
    return json.loads(Path(path).read_text())


def _amd(code):
    """From the assembly's metadata; what is spilled is counted in vector registers, not bytes."""
    keys = ("vgpr_count", "private_segment_fixed_size", "vgpr_spill_count", "vgpr_spill_count")
    return tuple(int(re.search(rf"\.{key}:\s*(\d+)", code).group(1)) for key in keys)


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
