"""How long a program takes: one of its warps walks through the machine code in order, as the hardware would.

An instruction waits for its registers, read or written, for its turn among the warps of its scheduler and, at a barrier, for all warps. What
these want of a pipe between two barriers is a floor. Branches are taken to fall through: both sides of an ``if`` count.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from .cards import Steps
from .sass import ATOMICS, Code, Instruction, Loop

# Cycles that a warp's instruction takes on a pipe of a scheduler: 32 lanes over a quarter of the multiprocessor's results a
# cycle (CUDA programming guide, throughput of native arithmetic instructions, compute capability 9.0: 64 or 16 a cycle).
HALF, SIXTEENTH = 2, 8
ALU = ("IADD3", "VIADD", "LOP3", "SHF", "ISETP", "SEL", "PRMT", "LEA", "IMNMX", "VIMNMX", "VIMNMX3", "FSETP")
ALU += ("FMNMX", "FSEL", "PLOP3", "SGXT", "P2R", "R2P", "VOTE", "IABS", "BMSK", "MOV", "R2UR")
SPECIAL = ("MUFU", "POPC", "FLO", "BREV", "I2F", "I2FP", "F2I", "F2F", "F2FP", "REDUX")
ROUNDS = 4  # of a loop that are walked: more than any pipeline is deep
MMA = 8  # cycles of an HMMA.16816; assumed, half of what wgmma reaches
MEMORY = ("LDG", "LD", "STG", "ST", "LDGSTS", "RED", "REDG", *ATOMICS)
SHARED = ("LDS", "LDSM", "STS", "STSM", "SHFL")
L2_BYTES, SHARED_BYTES = 64, 128  # that a multiprocessor moves in a cycle; the first is assumed
WORDS = {".64": 2, ".128": 4, ".M88.2": 2, ".M88.4": 4}  # of 4 bytes a thread, or tiles of as many


@dataclass
class Warp:
    """One warp on its way.

    Attributes:
        constants: how long steps take.
        memory: cycles of a load from global memory.
        load: warps of its scheduler, itself included.
    """

    constants: Steps
    memory: float
    load: float
    clock: float = 0.0
    ready: dict[str, float] = field(default_factory=dict)  # register -> when its value is there
    copies: list[float] = field(default_factory=list)  # when the groups of cp.async have arrived
    copying: float = 0.0  # when the group that is still open has
    since: float = 0.0  # the last time all warps met
    wanted: Counter[str] = field(
        default_factory=Counter
    )  # pipe -> cycles wanted of it by each warp since then

    def walk(
        self, code: Code, first: int, last: int, loops: Iterable[Loop], trips: Callable[[Loop], float]
    ) -> None:
        """Go through instructions ``first`` to ``last``, in which ``loops`` lie, each as often as ``trips`` says."""
        at = first
        for loop in loops:
            self._straight(code, at, loop.first)
            self._loop(code, loop, trips)
            at = loop.last + 1
        self._straight(code, at, last + 1)

    def _straight(self, code: Code, first: int, stop: int) -> None:
        for instruction in code.instructions[first:stop]:
            self.step(instruction)

    def _loop(self, code: Code, loop: Loop, trips: Callable[[Loop], float]) -> None:
        """Some rounds are walked, until what was loaded ahead of the loop is used up; the others take as long as the last."""
        n = trips(loop)
        rounds, took = min(math.ceil(n), ROUNDS), 0.0
        for _ in range(rounds):
            before = self.clock
            self.walk(code, loop.first, loop.last, loop.inner, trips)
            self.meet()
            took = self.clock - before
        self._skip((n - rounds) * took)

    def _skip(self, cycles: float) -> None:
        """Let time pass in which everything goes on as it is."""
        self.clock += cycles
        self.since += cycles
        self.copying += cycles
        self.copies = [at + cycles for at in self.copies]
        self.ready = {name: at + cycles for name, at in self.ready.items()}

    def step(self, x: Instruction) -> None:
        """Issue one instruction."""
        self.wanted["issue"] += 1
        # its next turn: at once if the others' fall into the times it waits, after theirs if all walk in step
        self.clock += 1 + self.constants.in_step * (self.load - 1)
        if x.guard == "!PT":  # never runs
            return
        self.clock = max([self.clock, *(self.ready.get(name, 0.0) for name in (*x.reads, *x.writes))])
        pipe, cycles = self._pipe(x)
        self.wanted[pipe] += cycles
        if x.base == "BAR":
            self.meet()
            self.clock += self.constants.barrier
        elif x.base == "MEMBAR":
            self.clock += self.constants.fence
        elif x.base == "LDGSTS":
            self.copying = self.clock + self.memory
        elif x.base == "LDGDEPBAR":
            self.copies.append(self.copying)
        elif x.base == "DEPBAR" and (pending := int(x.text.rpartition(" ")[2], 0)) < len(self.copies):
            self.clock = max(self.clock, self.copies[-1 - pending])
        for name in x.writes:
            self.ready[name] = self.clock + self._latency(x)

    def meet(self) -> None:
        """Wait until all warps have had what they wanted of the pipes since they met last."""
        self.clock = max(self.clock, self.since + self.load * max(self.wanted.values(), default=0))
        self.since = self.clock
        self.wanted.clear()

    def _latency(self, x: Instruction) -> float:
        c = self.constants
        if x.base in ATOMICS:
            return c.atomic
        if x.base in ("LDG", "LD"):
            return self.memory
        if x.base in ("LDS", "LDSM", "ATOMS"):
            return c.shared
        if x.base == "SHFL":
            return c.shuffle
        if x.base in ("HMMA", "IMMA"):
            return c.mma
        if x.base in SPECIAL:
            return c.special
        return c.start if x.base in ("S2R", "S2UR", "LDC", "ULDC", "CS2R") else c.fixed

    def _pipe(self, x: Instruction) -> tuple[str, float]:
        """(pipe, cycles of it); loads and stores share one of the whole multiprocessor, so that four warps wait for it."""
        words = next((n for suffix, n in WORDS.items() if suffix in x.op), 1)
        if x.base in MEMORY:
            return "memory", 4 * 32 * 4 * words / L2_BYTES
        if x.base in SHARED:
            return "memory", 4 * 32 * 4 * words / SHARED_BYTES
        if x.base == "ATOMS":
            return "memory", 4 * self.constants.conflict
        if x.base in ALU:
            return "integer", HALF
        if x.base == "IMAD":
            return "multiply", HALF
        if x.base in SPECIAL:
            return "special", SIXTEENTH
        if x.base in ("HMMA", "IMMA"):
            return "mma", MMA
        return "other", 0


def walked(warp: Warp, code: Code, first: int, last: int, trips: Callable[[Loop], float]) -> float:
    """Cycles of instructions ``first`` to ``last`` and the loops in them, code met for the first time included."""
    loops = [loop for loop in code.loops if first <= loop.first and loop.last <= last]
    warp.walk(code, first, last, loops, trips)
    warp.meet()
    return warp.clock + (last + 1 - first) * 16 / 128 * warp.constants.fetch
