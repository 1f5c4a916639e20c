"""Compile what a launcher would launch, for a GPU that is not there, and read the resources off the cubin.

A stub driver answers Triton's questions about the device, and every launch is turned into a compilation: so the
specialisation, tiles and warps are those of a real call. Nothing runs; the tensors are on the meta device.
"""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
SHARED_LIMIT = {
    80: 166912,
    90: 232448,
    100: 232448,
    120: 101376,
}  # bytes one block may use (CUDA programming guide)


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


def _keep_log(*call):
    """A hook of Triton's: the words of its assembler, spills among them, are kept in the kernel's metadata."""
    if not call:
        return "", ""  # newer ones also ask what to add to the kernel's key
    stages = call[1]
    assemble = stages.get("cubin")

    def cubin(ptx, metadata):
        with contextlib.redirect_stdout(io.StringIO()) as log:
            binary = assemble(ptx, metadata)
        metadata["ptxas"] = log.getvalue()
        return binary

    if assemble is not None:
        stages["cubin"] = cubin


@contextlib.contextmanager
def _keeping_logs():
    """Inside, kernels go to a cache of their own: those of the common one were assembled without the hook."""
    with knobs.cache.scope(), knobs.nvidia.scope(), knobs.runtime.scope():
        knobs.cache.dir = str(Path(knobs.cache.dir) / "offline")
        knobs.nvidia.dump_ptxas_log = True
        knobs.runtime.add_stages_inspection_hook = _keep_log
        yield


@contextlib.contextmanager
def compiling(arch):
    """Inside, a kernel launch compiles and adds its CompiledKernel to the list this yields."""
    compiled, launched, run, active, hip = [], [], JITFunction.run, driver._active, torch.version.hip

    def record(self, *args, grid, warmup, **kwargs):
        if not isinstance(arch, int):
            kwargs.pop("maxnreg", None)  # some launchers decide about it when they are imported
        launched.append(self)
        compiled.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    JITFunction.run = record
    driver.set_active(_StubDriver(arch))
    torch.version.hip = None if isinstance(arch, int) else "0.0"  # by which launchers tell AMD
    try:
        with _keeping_logs():
            yield compiled
    finally:
        JITFunction.run = run
        driver._active, torch.version.hip = active, hip
        for kernel in launched:
            kernel.device_caches.clear()  # they go by device number, and every stub is device 0


def compile_launches(launch, arch):
    """Call ``launch()`` and return a Compiled for each kernel it would have launched."""
    with compiling(arch) as compiled:
        launch()
    return [_inspect(kernel, arch) for kernel in compiled]


def compile_clean(launch, arch):
    """The same, each of them without an atomic on floats or one that no barrier comes before, and small enough for a block.

    Also proves that a launcher never waits for the device: a meta tensor has no value to wait for.
    """
    compiled = compile_launches(launch, arch)
    assert compiled
    for kernel in compiled:
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
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.binary)
        file.flush()
        command = [CUOBJDUMP, "-sass", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
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
    used = _nvidia(meta.ptxas) if isinstance(arch, int) else _amd(code)
    return Compiled(meta.name, arch, meta.num_warps, *used, meta.shared, code, binary)


def _nvidia(log):
    """Registers, stack, spill stores and loads, as the assembler gave them out."""
    memory = r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    stack, stores, loads, registers = re.search(rf"{memory}.*?Used (\d+) registers", log, re.DOTALL).groups()
    return int(registers), int(stack), int(stores), int(loads)


def _amd(code):
    """The same, from the assembly's metadata; what is spilled is counted in vector registers, not bytes."""
    keys = ("vgpr_count", "private_segment_fixed_size", "vgpr_spill_count", "vgpr_spill_count")
    return tuple(int(re.search(rf"\.{key}:\s*(\d+)", code).group(1)) for key in keys)
