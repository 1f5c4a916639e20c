"""Tile sizes and head splits of the Triton kernels, one varied at a time, hot and cold: what the defaults should be.

A launcher's setting is exchanged for the length of a measurement; each variant passes the gate before it is timed.
Without a GPU, `--check` runs every variant once in the interpreter (TRITON_INTERPRET=1) at a tiny size.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from triton.runtime.errors import OutOfResources

sys.path.insert(0, str(Path(__file__).parent))  # the folder only: a checkout must stay off the path

from micro.cases import CASES, Case
from micro.clock import measure
from micro.gate import WrongResultError
from micro.inputs import Inputs
from micro.shapes import SHAPES, TINY, Setting

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
    Knob("received_attention", "score_select", "tiles", (1, 2, 3), "num_stages"),
    Knob("row_lse", "row_lse", "tiles", (32, 64, 128), "BLOCK_N"),
    Knob("row_lse", "row_lse", "tiles", (2, 4, 8), "num_warps"),
    Knob("row_lse", "row_lse", "KEYS_PER_SPLIT", (256, 512, 1024)),
    Knob("prune_tokens", "score_select", "WARPS", (4, 8, 16)),
    Knob("gather_tokens", "gather_tokens", "BLOCK_K", (4, 8, 16, 32)),
    Knob("gather_tokens", "gather_tokens", "BLOCK_BYTES", (256, 512, 1024)),
    Knob("compact_kv", "compact_kv", "BLOCK_K", (32, 64, 128)),
    Knob("compact_kv", "compact_kv", "BLOCK_BYTES", (128, 256, 512)),
    Knob("select_topk", "select_topk", "KEYS_PER_WARP", (128, 256, 512)),
)


def lines(x: Inputs, seconds: float, modes: tuple[str, ...]) -> Iterator[str]:
    """One line a variant: gated, then timed in each mode."""
    for knob in KNOBS:
        case = next(case for case in CASES if case.name == knob.case)
        for value in knob.values:
            with knob.set(value):
                yield (
                    f"{knob.case}, {x.shape.name}, R={x.setting.n_rows}, {knob.label(value)}: "
                    + _times(case, x, seconds, modes)
                )


def _times(case: Case, x: Inputs, seconds: float, modes: tuple[str, ...]) -> str:
    def run(inputs: Inputs) -> Any:
        with ops.use_backend("triton"):
            return case.run(inputs)

    try:
        case.gate(x, run)
        found = [measure(lambda: run(x), x.device, mode, seconds) for mode in modes]
    except (OutOfResources, WrongResultError) as error:
        return f"unusable: {error}"
    cells = [f"{t.mode} {t.median:.2f} us ({t.p20:.2f}..{t.p80:.2f})" for t in found]
    return ", ".join(cells) or "right"


def main() -> int:
    """Print one line a variant."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="no times: each variant once, at a tiny size")
    parser.add_argument("--seconds", type=float, default=0.05, help="per variant and mode")
    chosen = parser.parse_args()
    if chosen.check:
        for line in lines(Inputs(Setting(TINY, torch.float32, 2, torch.device("cpu"))), 0.0, ()):
            print(line, flush=True)
        return 0
    if not torch.cuda.is_available():
        print("needs a GPU (--check tries the variants in the interpreter)")
        return REFUSED
    for shape in SHAPES:
        for rows in (1, 64):
            x = Inputs(Setting(shape, torch.bfloat16, rows, torch.device("cuda")))
            for line in lines(x, chosen.seconds, ("graph", "hot")):
                print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
