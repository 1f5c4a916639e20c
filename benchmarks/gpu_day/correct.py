"""Is anything wrong? Every case by every backend of ours against the truth, at the real shapes."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from micro.gate import FAILURES, failed
from micro.inputs import Inputs
from micro.restart import Journal, device_lost, leave, run_to_the_end
from micro.shapes import Shape
from micro.sweep import Sweep, title


def run_checks(command: Sequence[str], shapes: Sequence[Shape], journal: Path | None) -> int:
    """``command --shape NAME --journal FILE`` for all shapes at once; the worst exit code."""
    with tempfile.TemporaryDirectory() as scratch:
        base = journal or Path(scratch) / "check"

        def one(shape: Shape) -> int:
            own = base.with_name(f"{base.name}.{shape.name}")
            line = [*command, "--shape", shape.name, "--journal", str(own)]
            code, restarts = run_to_the_end(lambda: subprocess.run(line, check=False).returncode, own)
            return abs(code) or restarts

        with ThreadPoolExecutor(len(shapes)) as pool:
            return min(max(pool.map(one, shapes)), 1)


def check(
    shape: Shape, device: torch.device, dtype: torch.dtype, journal: Journal, backends: Sequence[str] = ()
) -> int:
    """Gate every case at one shape, by these backends or all, and print how it went; 1 if one was wrong or broke."""
    bad = False
    with _counted(shape):
        for case, setting in Sweep(device, [shape], [dtype], (1, 64), (), 0.0).settings():
            x = Inputs(setting)
            for provider in case.own():
                name = title(case, x, provider)
                if (backends and provider.name not in backends) or not journal.begin(name):
                    continue
                error, note = None, provider.why_not(x)
                try:
                    if note is None:
                        case.gate(x, provider.run)
                except FAILURES as failure:
                    error, note, bad = failure, failed(failure), True
                _say(f"{name}: {note or 'right'}")
                if error is not None and device_lost(error):
                    leave()
    return int(bad)


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")  # in one piece: other processes write, too
    sys.stdout.flush()


@contextmanager
def _counted(shape: Shape) -> Iterator[None]:
    """Say at the end how many kernels Triton found in its cache."""
    from triton import knobs

    found = {True: 0, False: 0}

    def count(*, cache_hit: bool, **_: Any) -> None:
        found[cache_hit] += 1

    with knobs.compilation.scope():
        knobs.compilation.listener = count
        yield
    _say(f"{shape.name}: {found[True]} kernels were compiled before, {found[False]} were not")
