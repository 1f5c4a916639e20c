"""Machine code of a cubin: its instructions, where each comes from, and its loops.

nvdisasm, which Triton ships, says of an instruction which line of which file it comes from, and from where that function was
called. A loop is a backward branch; the ``for`` or ``while`` that the branch comes from gives it its name.
"""

from __future__ import annotations

import ast
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import triton

import vlmprune.triton_kernels as package

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SOURCE = re.compile(r'\s*//## File "([^"]+)", line (\d+)')
LABEL = re.compile(r"\s*(\.L_x_\d+):")
CODE = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P[T\d]+)\s+)?([A-Z][^;]*?)\s*;")
REGISTER = re.compile(r"\b(U?[RP]\d+)\b(\.64)?")
PREDICATE = re.compile(r"U?P[T\d]+$")
ATOMICS = ("ATOM", "ATOMG")  # on global memory, with an answer: how programs count themselves in
COUNTED = {
    "global loads": ("LDG", "LD", "LDGSTS"),
    "global stores": ("STG", "ST"),
    "shared": ("LDS", "LDSM", "STS", "STSM", "ATOMS"),
    "MMA": ("HMMA", "IMMA", "HGMMA"),
    "SHFL": ("SHFL", "REDUX"),
    "barriers": ("BAR",),
    "atomics": (*ATOMICS, "ATOMS", "RED", "REDG"),
    "MUFU": ("MUFU",),
}


@dataclass(frozen=True)
class Instruction:
    """One machine instruction.

    Attributes:
        op: its name with modifiers.
        guard: the predicate it depends on, "" if it always runs.
        writes: registers that it gives a value.
        reads: registers that it waits for.
        text: all of it, as disassembled.
        where: (file, line) that it comes from, then those of the calls around that, as far as the compiler says.
    """

    op: str
    guard: str
    writes: tuple[str, ...]
    reads: tuple[str, ...]
    text: str
    where: tuple[tuple[str, int], ...]

    @property
    def base(self) -> str:
        """The name without modifiers."""
        return self.op.partition(".")[0]


@dataclass(frozen=True)
class Source:
    """The Python loop that a loop comes from: its function, its first line of code, and the call of the function, if known."""

    function: str
    header: str
    call: str | None

    def __str__(self) -> str:
        return f"{self.function}: {self.header}" + (f", called as {self.call}" if self.call else "")


@dataclass
class Loop:
    """Instructions ``first`` to ``last``, which ends with the branch back; inner loops in the order of the code."""

    first: int
    last: int
    source: Source | None
    inner: list[Loop] = field(default_factory=list)


@dataclass(frozen=True)
class Code:
    """A kernel's instructions and its outermost loops, both in the order of the code."""

    instructions: tuple[Instruction, ...]
    loops: tuple[Loop, ...]

    def every_loop(self) -> Iterator[tuple[int, Loop]]:
        """(depth, loop), each before those inside it."""

        def walk(loops: Sequence[Loop], depth: int) -> Iterator[tuple[int, Loop]]:
            for loop in loops:
                yield depth, loop
                yield from walk(loop.inner, depth + 1)

        return walk(self.loops, 0)

    def counts(self, loop: Loop) -> dict[str, int]:
        """Instructions of one pass through a loop, inner loops once, all of them and by kind."""
        found = Counter(i.base for i in self.instructions[loop.first : loop.last + 1])
        kinds = {kind: sum(found[base] for base in bases) for kind, bases in COUNTED.items()}
        return {"instructions": found.total(), **kinds}


def disassemble(cubin: bytes) -> str:
    """The listing of a cubin, with the lines its instructions come from."""
    return _tool("nvdisasm", "-gi", "-c", cubin=cubin)


def registers(cubin: bytes) -> int:
    """Registers a thread takes."""
    found = re.search(r"\bREG:(\d+)", _tool("cuobjdump", "-res-usage", cubin=cubin))
    assert found is not None, "cuobjdump names no registers"
    return int(found.group(1))


def _tool(name: str, *options: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(TOOLS / name), *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def parse(listing: str) -> Code:
    """The code of a listing of one kernel."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    where: list[tuple[str, int]] = []
    described = False  # whether ``where`` already belongs to the instruction to come
    for line in listing.splitlines():
        if found := SOURCE.match(line):
            where = [*(where if described else ()), (found[1], int(found[2]))]
            described = True
        elif found := LABEL.match(line):
            labels[found[1]] = len(instructions)
        elif found := CODE.match(line):
            instructions.append(_instruction(found[1] or "", found[2], tuple(where)))
            described = False
    branches = {i: labels[label] for i, x in enumerate(instructions) if (label := _target(x)) in labels}
    return Code(tuple(instructions), tuple(_loops(instructions, branches)))


def _instruction(guard: str, text: str, where: tuple[tuple[str, int], ...]) -> Instruction:
    op, _, rest = text.partition(" ")
    operands = [x.strip() for x in rest.split(",")] if rest else []
    outputs = _outputs(op.partition(".")[0], operands)
    width = _width(op)
    stores = op.startswith(("ST", "HMMA"))
    writes = [name for x in operands[:outputs] for name in _names(x, width)]
    reads = [name for x in operands[outputs:] for name in _names(x, width if stores else 1)]
    return Instruction(op, guard, tuple(writes), (*reads, *_names(guard, 1)), text, where)


def _outputs(base: str, operands: list[str]) -> int:
    """How many of the operands an instruction writes: predicates, a register, and predicates behind it (carries)."""
    if base.startswith(("ST", "RED", "BAR", "BRA", "LDGSTS", "DEPBAR", "CCTL", "BSSY", "BSYNC")):
        return 0
    if "SETP" in base or base.endswith("PLOP3"):
        return 2
    n = seen = 0
    for x in operands:
        if not PREDICATE.match(x):
            if seen or not re.match(r"U?R(\d+|Z)$", x):
                break
            seen = 1
        n += 1
    return n


def _names(operand: str, width: int) -> list[str]:
    """Registers of an operand, ``width`` from each on; of an address two, of a predicate one."""
    out = []
    for name, pair in REGISTER.findall(operand):
        kind, number = re.match(r"(\D+)(\d+)", name).groups()  # type: ignore[union-attr]
        n = 1 if kind.endswith("P") else 2 if pair else 1 if "[" in operand else width
        out += [f"{kind}{int(number) + i}" for i in range(n)]
    return out


def _width(op: str) -> int:
    """Registers of a value."""
    if op.startswith("HMMA") or ".128" in op or op.endswith("M88.4"):
        return 4
    return 2 if ".64" in op or ".WIDE" in op or op.startswith("CS2R") or op.endswith("M88.2") else 1


def _target(x: Instruction) -> str | None:
    found = re.search(r"\.L_x_\d+", x.text) if x.base == "BRA" else None
    return None if found is None else found.group()


def _loops(instructions: Sequence[Instruction], branches: dict[int, int]) -> list[Loop]:
    """The outermost loops, with those inside them."""
    ends: dict[int, int] = {}  # where a loop begins -> where it ends
    for last, first in branches.items():
        if first < last and _leads_to(first, last, branches, instructions):
            ends[first] = max(last, ends.get(first, last))
    outermost: list[Loop] = []
    stack: list[Loop] = []
    for first, last in sorted(ends.items()):
        loop = Loop(first, last, _source(instructions[last].where))
        while stack and stack[-1].last < first:
            stack.pop()
        assert not stack or last <= stack[-1].last, f"loops overlap: {stack[-1]} and {loop}"
        (stack[-1].inner if stack else outermost).append(loop)
        stack.append(loop)
    return outermost


def _leads_to(first: int, last: int, branches: dict[int, int], instructions: Sequence[Instruction]) -> bool:
    """Whether the code between leads from ``first`` to ``last``: a block that was moved to the end only returns."""
    seen, ahead = set(), [first]
    while ahead:
        i = ahead.pop()
        if i == last:
            return True
        if i in seen or not first <= i < last:
            continue
        seen.add(i)
        x = instructions[i]
        jumps = i in branches
        if jumps:
            ahead.append(branches[i])
        if x.guard or not (jumps or x.base == "EXIT"):
            ahead.append(i + 1)
    return False


def _source(where: Sequence[tuple[str, int]]) -> Source | None:
    """The innermost Python loop around a place in the code; None if there is none."""
    for i, (path, line) in enumerate(where):
        function, header = _around(path, line)
        if header is not None:
            call = _call(*where[i + 1], function) if i + 1 < len(where) else None
            return Source(function, header, call)
    return None


@cache
def _tree(path: str) -> ast.Module:
    """The syntax of a file; one of ours is read where it stands now, for a cached cubin may come from another checkout."""
    file = Path(path)
    ours = Path(package.__path__[0], file.name)
    return ast.parse((ours if file.parent.name == "triton_kernels" else file).read_text())


def _spans(node: ast.AST, line: int) -> bool:
    return getattr(node, "lineno", line + 1) <= line <= getattr(node, "end_lineno", line - 1)


def _around(path: str, line: int) -> tuple[str, str | None]:
    """(function, first line of the innermost loop) around a line; loops that Triton unrolls are none."""
    function, header = "", None
    for node in ast.walk(_tree(path)):  # outer ones come first
        if not _spans(node, line):
            continue
        if isinstance(node, ast.FunctionDef):
            function = node.name
        elif isinstance(node, ast.For) and "static_range" not in ast.unparse(node.iter):
            header = f"for {ast.unparse(node.target)} in {ast.unparse(node.iter)}"
        elif isinstance(node, ast.While):
            header = f"while {ast.unparse(node.test)}"
    return function, header


def _call(path: str, line: int, function: str) -> str | None:
    """The call of a function on a line."""
    calls = [node for node in ast.walk(_tree(path)) if isinstance(node, ast.Call) and _spans(node, line)]
    own = [ast.unparse(node) for node in calls if getattr(node.func, "id", None) == function]
    return min(own, key=len, default=None)
