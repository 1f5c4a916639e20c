"""Tile sizes and head splits of the Triton kernels, one varied at a time, hot and cold: what the defaults should be.

A launcher's setting is exchanged for the length of a measurement; each variant passes the gate before it is timed. Every shape
comes at one scoring row first. The settings as they are are measured beside their variants, and the best is named.
Without a GPU, `--check` runs every variant once in the interpreter (TRITON_INTERPRET=1) at a tiny size.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).parent))  # the folder only: a checkout must stay off the path

from micro.cases import CASES, Case
from micro.clock import measure
from micro.gate import FAILURES, failed
from micro.inputs import Inputs
from micro.restart import Journal, device_lost, leave
from micro.shapes import SHAPES, TINY, Setting, Shape

from vlmprune import ops

REFUSED = 77  # exit code of a benchmark that cannot run here


@dataclass(frozen=True)
class Knob:
    """A setting of a kernel file: ``module.name`` takes each of ``values`` while ``case`` is measured.

    With a ``key`` it is a function, and what is exchanged is this one of the dict it returns.
    """

    case: str
    module: str
    name: str
    values: tuple[Any, ...]
    key: str | None = None

    def label(self, value: Any) -> str:
        """How a line of the output names the variant."""
        return f"{self.module}.{self.name}{'' if self.key is None else f'[{self.key}]'} = {value}"

    @contextmanager
    def set(self, value: Any) -> Iterator[None]:
        """The kernel file with this one setting exchanged."""
        module = importlib.import_module(f"vlmprune.triton_kernels.{self.module}")
        default = getattr(module, self.name)
        changed = value if self.key is None else lambda *args: default(*args) | {self.key: value}
        with mock.patch.object(module, self.name, changed):
            yield


KNOBS = (
    Knob("received_attention", "score_select", "tiles", (32, 64, 128), "BLOCK_N"),
    Knob("received_attention", "score_select", "tiles", (2, 4, 8), "num_warps"),
    Knob("received_attention", "score_select", "STAGES", (2, 3, 4)),
    Knob("received_attention", "score_select", "MOST_PROGRAMS", (144, 288, 576, 1152)),
    Knob("received_attention", "score_select", "WIDE", (0, 72 * 1024, 1 << 40)),
    Knob("row_lse", "row_lse", "tiles", (32, 64, 128), "BLOCK_N"),
    Knob("row_lse", "row_lse", "tiles", (2, 4, 8), "num_warps"),
    Knob("row_lse", "row_lse", "KEYS_PER_SPLIT", (256, 512, 1024)),
    Knob("prune_tokens", "select_columns", "SHARE", (1024, 2048, 4096)),
    Knob("gather_tokens", "gather_tokens", "BLOCK_K", (4, 8, 16, 32)),
    Knob("gather_tokens", "gather_tokens", "BLOCK_BYTES", (256, 512, 1024)),
    Knob("compact_kv", "compact_kv", "BLOCK_K", (32, 64, 128)),
    Knob("compact_kv", "compact_kv", "BLOCK_BYTES", (128, 256, 512)),
    Knob("select_topk", "select_topk", "KEYS_PER_WARP", (256, 512, 1024)),
)


@dataclass(frozen=True)
class Variant:
    """One value of one knob, or the settings as they are."""

    knob: Knob | None = None
    value: Any = None

    def __str__(self) -> str:
        return "as it is" if self.knob is None else self.knob.label(self.value)

    def timed(self, case: Case, x: Inputs, seconds: float, modes: Sequence[str]) -> list[float]:
        """Medians in the modes, of a result that is right; raises one of FAILURES."""

        def run(inputs: Inputs) -> Any:
            with ops.use_backend("triton"):
                return case.run(inputs)

        with nullcontext() if self.knob is None else self.knob.set(self.value):
            case.gate(x, run)
            return [measure(lambda: run(x), x.device, mode, seconds).median for mode in modes]


@dataclass
class Sweep:
    """Variants of every case, as long as there is time.

    Attributes:
        seconds: per variant and mode.
        modes: of ``clock.measure``.
        end: by time.perf_counter.
        journal: what it names is not measured again.
    """

    seconds: float
    modes: Sequence[str]
    end: float
    journal: Journal

    def lines(self, shapes: Sequence[Shape], rows: Sequence[int], dtype: torch.dtype) -> Iterator[str]:
        """One line a variant, and one for the best of each case and setting."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        for n in rows:
            for shape in shapes:
                x = Inputs(Setting(shape, dtype, n, device))
                for name in dict.fromkeys(knob.case for knob in KNOBS):
                    case = next(case for case in CASES if case.name == name)
                    if n == rows[0] or case.scored:
                        yield from self._case(case, x)

    def _case(self, case: Case, x: Inputs) -> Iterator[str]:
        title = f"{case.name}, {x.shape.name}, R={x.setting.n_rows}"
        variants = [Variant(knob, value) for knob in KNOBS if knob.case == case.name for value in knob.values]
        left = [variant for variant in variants if f"{title}, {variant}" not in self.journal]
        medians: dict[str, float] = {}
        for variant in [Variant(), *left] if left else []:
            if time.perf_counter() > self.end:
                yield f"{title}, {variant}: no time left"
                return
            if variant.knob is not None:
                self.journal.begin(f"{title}, {variant}")
            try:
                found = variant.timed(case, x, self.seconds, self.modes)
            except FAILURES as error:
                yield f"{title}, {variant}: {failed(error)}"
                if device_lost(error):
                    leave()
                continue
            cells = [f"{mode} {us:.2f} us" for mode, us in zip(self.modes, found, strict=True)]
            yield f"{title}, {variant}: {', '.join(cells) or 'right'}"
            medians |= {str(variant): us for us in found[:1]}
        if medians:
            best = min(medians, key=medians.__getitem__)
            yield f"{title}: best {best}, {medians[best]:.2f} us; as it is {medians.get('as it is', float('nan')):.2f} us"


def arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--check", action="store_true", help="no times: each variant once, at a tiny size")
    add("--seconds", type=float, default=0.05, help="per variant and mode")
    add("--budget", type=float, default=float("inf"), help="seconds for everything")
    add("--rows", type=int, nargs="+", default=(1, 64), help="numbers of scoring rows")
    add("--journal", type=Path, help="file of what was begun, which is not measured again")
    return parser.parse_args()


def main() -> int:
    """Print one line a variant."""
    chosen = arguments()
    end, journal = time.perf_counter() + chosen.budget, Journal(chosen.journal)
    if chosen.check:
        lines = Sweep(0.0, (), end, journal).lines((TINY,), (2,), torch.float32)
    elif not torch.cuda.is_available():
        print("needs a GPU (--check tries the variants in the interpreter)")
        return REFUSED
    else:
        sweep = Sweep(chosen.seconds, ("graph", "hot"), end, journal)
        lines = sweep.lines(SHAPES, chosen.rows, torch.bfloat16)
    for line in lines:
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
