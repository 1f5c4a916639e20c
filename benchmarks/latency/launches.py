"""The launches of prune_tokens at a shape, compiled for a GPU that is not there, and how many of their programs run at once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from math import prod
from types import SimpleNamespace
from typing import Any

import torch
from micro.inputs import Inputs
from micro.shapes import Setting, Shape
from micro.stub import stubbed
from torch import Tensor

from vlmprune.ops.prune_tokens import checked

from .cards import MAX_BLOCKS, MAX_WARPS, REGISTER_UNIT, REGISTERS, SHARED, SHARED_RESERVED
from .sass import Code, disassemble, parse, registers


class MetaInputs(Inputs):
    """The inputs of a benchmark, without content."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(Setting(shape, torch.bfloat16, 1, torch.device("meta")))

    def draw(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor of no content."""
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)

    @cached_property
    def lse(self) -> Tensor:
        """``[1, H, S]``."""
        return self.draw("lse", *self.query.shape[:3], dtype=torch.float32)


@dataclass(frozen=True, eq=False)
class Compiled:
    """A launch and its machine code.

    Attributes:
        name: the kernel's.
        grid: programs along three axes.
        arguments: the kernel's arguments by name, constants and options of the launch among them.
        warps: of a program.
        registers: of a thread.
        shared: bytes of a program.
        code: instructions and loops.
    """

    name: str
    grid: tuple[int, int, int]
    arguments: SimpleNamespace
    warps: int
    registers: int
    shared: int
    code: Code

    @property
    def programs(self) -> int:
        """Programs in all."""
        return prod(self.grid)

    @property
    def resident(self) -> int:
        """Programs that a multiprocessor holds at once."""
        return resident(self.warps, self.registers, self.shared)


def resident(warps: int, registers: int, shared: int) -> int:
    """Programs of so many warps, registers a thread and bytes of shared memory that a multiprocessor holds at once."""
    of_a_warp = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    by_registers = REGISTERS // of_a_warp // warps
    return min(MAX_BLOCKS, MAX_WARPS // warps, by_registers, SHARED // (shared + SHARED_RESERVED))


@cache
def compiled_launches(shape: Shape) -> tuple[Compiled, ...]:
    """What prune_tokens launches at a shape: bf16, one scoring row, its log-sum-exp given."""
    from vlmprune.triton_kernels._launch import recording
    from vlmprune.triton_kernels.prune_tokens import prune_tokens

    x = MetaInputs(shape)
    lists = dict(rows=x.rows, columns=x.columns, keep=shape.keep, lse=x.lse)
    with stubbed():
        arguments = checked(x.query, x.key, x.tensors, **lists)
        with recording() as recorded:
            prune_tokens(*arguments)
        return tuple(_compiled(*launch) for launch in recorded)


def _compiled(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], meta: dict[str, Any]) -> Compiled:
    binary = kernel.warmup(*args, grid=grid, **meta)
    cubin, metadata = binary.asm["cubin"], binary.metadata
    named = dict(zip(kernel.arg_names, args, strict=False)) | meta
    return Compiled(
        kernel.__name__,
        (*grid, 1, 1)[:3],
        SimpleNamespace(**named),
        metadata.num_warps,
        registers(cubin),
        metadata.shared,
        parse(disassemble(cubin)),
    )
