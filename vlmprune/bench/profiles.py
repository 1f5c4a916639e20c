"""Where time goes: a trace of torch's profiler over all arms, and what it says by arm, range and operation."""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function

from vlmprune.bench.arms import Arm
from vlmprune.bench.measure import answer
from vlmprune.errors import InputError, check

ARM, OURS = "vlmprune bench: ", "vlmprune: "
REST = "other"
"""What lies in an arm but in no range of ours: ``generate`` itself, embedding, the head, sampling."""
STEPS = 2
Event = Mapping[str, Any]


@dataclass(frozen=True)
class Spent:
    """Time of one operation in one range of one arm.

    Attributes:
        arm: its name.
        range: "vision", "prefill", "selection, layer K", "decode" or "other".
        operation: an operation of PyTorch, or a kernel where there is a GPU.
        seconds: its own, without what it called.
        calls: how often.
    """

    arm: str
    range: str
    operation: str
    seconds: float
    calls: int


def write_profile(path: Path, model: Any, arms: Sequence[Arm], warm_up: int) -> None:
    """Write a Chrome trace of one answer of every arm that can run, each in a range with the arm's name.

    A path that ends in ``.gz`` is compressed. Prompts of one sample and ``STEPS`` decode steps. The warm-ups before each are in the trace, too, in no such range.
    """
    gpu = model.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]) as seen:
        for arm in arms:
            if arm.reason is not None:
                continue
            with arm.scope(model):
                inputs = arm.prompt.inputs(model.config, 1, model.device, model.dtype)
                for _ in range(warm_up):
                    answer(model, inputs, 1)
                with record_function(ARM + arm.name):
                    answer(model, inputs, 1 + STEPS)
    seen.export_chrome_trace(str(path))


def read_profile(path: Path | str) -> list[Spent]:
    """What a trace says: the arms as they came, of each the longest operation first.

    Args:
        path: what ``vlmprune bench --profile`` wrote, plain or as ``.gz``.

    Raises:
        InputError: no such trace.
    """
    path = Path(path)
    check(path.is_file(), "profile", "a file written by vlmprune bench --profile", repr(str(path)))
    try:
        data = path.read_bytes()
        events = json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)["traceEvents"]
    except (ValueError, KeyError, TypeError, gzip.BadGzipFile) as error:
        raise InputError(f"profile: expected a Chrome trace, got {str(path)!r}: {error}") from error
    timed = [e for e in events if e.get("ph") == "X"]
    gpu = any(e["cat"] == "kernel" for e in timed)
    # On a GPU the same ranges are there a second time, around the kernels that were launched in them.
    ranges = [e for e in timed if e["cat"] == ("gpu_user_annotation" if gpu else "user_annotation")]
    work = [e for e in timed if e["cat"] == ("kernel" if gpu else "cpu_op")]
    rows: list[Spent] = []
    for arm in sorted(_named(ranges, ARM), key=lambda e: e["ts"]):
        found: dict[tuple[str, str], list[float]] = defaultdict(list)
        inner = [e for e in _named(ranges, OURS) if _inside(e, arm)]
        for event, own in _own_times([e for e in work if _inside(e, arm)]):
            around = [e for e in inner if _inside(event, e)]
            # The innermost of nested ranges: selection lies in prefill.
            name = min(around, key=_length)["name"].removeprefix(OURS) if around else REST
            found[name, event["name"]].append(own)
        spent = [
            Spent(arm["name"].removeprefix(ARM), *key, sum(times) / 1e6, len(times))
            for key, times in found.items()
        ]
        rows += sorted(spent, key=lambda row: -row.seconds)
    return rows


def by_range(rows: Sequence[Spent]) -> dict[str, dict[str, float]]:
    """Arm -> range -> seconds."""
    out: dict[str, dict[str, float]] = {}
    for row in rows:
        ranges = out.setdefault(row.arm, {})
        ranges[row.range] = ranges.get(row.range, 0.0) + row.seconds
    return out


def _named(events: Iterable[Event], start: str) -> list[Event]:
    return [e for e in events if e["name"].startswith(start)]


def _length(event: Event) -> float:
    return float(event["dur"])


def _inside(event: Event, other: Event) -> bool:
    return other["ts"] <= event["ts"] and event["ts"] + event["dur"] <= other["ts"] + other["dur"] + 1e-3


def _own_times(events: Iterable[Event]) -> Iterator[tuple[Event, float]]:
    """Every event with its time (microseconds) less that of the events right inside it, on its thread."""
    open_: dict[Any, list[tuple[Event, list[float]]]] = defaultdict(list)
    done: list[tuple[Event, list[float]]] = []
    for event in sorted(events, key=lambda e: (e["ts"], -e["dur"])):
        stack = open_[event["tid"]]
        while stack and not _inside(event, stack[-1][0]):
            stack.pop()
        if stack:
            stack[-1][1].append(event["dur"])
        entry: tuple[Event, list[float]] = (event, [])
        stack.append(entry)
        done.append(entry)
    for event, inner in done:
        yield event, event["dur"] - sum(inner)
