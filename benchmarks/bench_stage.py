"""Host time that a pruning stage adds to a prefill, as one fused pass and as separate ops, on a machine without a GPU.

A LLaVA of 32 empty layers, 576 visual and 60 text tokens; kernels are compiled for sm_90 and their launches counted, not
made (micro/stub.py). So what is timed is Python and PyTorch's dispatch, as CPU time: other processes do not count.

    TRITON_INTERPRET=0 python -P benchmarks/bench_stage.py [--json] [--small]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any

import torch
import triton

sys.path.insert(0, str(Path(__file__).parent))  # the folder only: a checkout must stay off the path

from micro.empty_model import WORD, make_model, make_prompt
from micro.stub import Filling, Launcher, cpu, launching

import vlmprune
from vlmprune.models import engine
from vlmprune.models.stage import StageRunner

POLICIES = (
    vlmprune.FastV(layer=2),
    vlmprune.Feather(layers=(8, 16)),
    vlmprune.FasterVLM(),
    vlmprune.Uniform(),
    vlmprune.PyramidDrop(),
)
WARM_UP = 3  # prefills of one shape: the first runs as an op, the second makes the plan, the third has it


@dataclass(frozen=True)
class Setting:
    """How large and how long."""

    layers: int = 32
    side: int = 24
    text: int = 60
    rounds: int = 15
    calls: int = 100
    turns: int = 3
    prefills: int = 15


SMALL = Setting(layers=25, side=6, text=12, rounds=1, calls=2, turns=1, prefills=1)


@dataclass(frozen=True)
class Line:
    """Microseconds of one policy on one road.

    Attributes:
        policy, road: which; "fused", or "ops": what a subclass gets whose ``select`` is its own.
        path: what the stage's record says.
        stage: ``StageRunner`` at the first stage, from what the scoring layer left to the rows that survive.
        reading: taking query and key from the layer before it; None where the policy reads none there.
        added: what whole prefills take longer than unpruned ones.
        launches: kernels that the first stage starts.
    """

    policy: str
    road: str
    path: str
    stage: float
    reading: float | None
    added: float
    launches: int


class Timer:
    """CPU time of this thread, in microseconds, without what it takes to fill outputs."""

    def __init__(self, filling: Filling, s: Setting) -> None:
        self.filling, self.s = filling, s

    def once(self, call: Callable[[], object], times: int = 1) -> float:
        """Mean of so many calls."""
        filled, start = self.filling.seconds, time.thread_time()
        for _ in range(times):
            call()
        taken = time.thread_time() - start
        return (taken - (self.filling.seconds - filled)) / times * 1e6

    def many(self, call: Callable[[], object]) -> float:
        """Median over rounds of the mean of a round, behind a first one to warm up."""
        return median([self.once(call, self.s.calls) for _ in range(1 + self.s.rounds)][1:])


def by_itself(policy: vlmprune.PruningPolicy) -> vlmprune.PruningPolicy:
    """The same policy, but for the runner one that chooses by itself: no fused pass."""
    kind = type(policy)
    own = type(kind.__name__, (kind,), {"select": lambda self, ctx: kind.select(self, ctx)})
    return own(**{f.name: getattr(policy, f.name) for f in fields(policy)})


@contextmanager
def put(owner: Any, name: str, what: object) -> Iterator[None]:
    """Inside, ``owner.name`` is ``what``."""
    before = getattr(owner, name)
    setattr(owner, name, what)
    try:
        yield
    finally:
        setattr(owner, name, before)


class Probe:
    """Times the first stage, and the reading before it, where they run in a prefill: again and again, on what they got."""

    def __init__(self, first: int, timer: Timer, looks: bool) -> None:
        """``looks``: whether the stage goes on with what the kernels would have written, so that it must be filled in."""
        self.first, self.timer, self.looks = first, timer, looks
        self.stage, self.launches, self.path = 0.0, 0, ""
        self.reading: float | None = None
        self._run, self._read = StageRunner.__call__, engine.read_attention

    def run(self, runner: StageRunner, prefill: Any, i: int, hidden: Any, rope: Any) -> Any:
        """In the place of ``StageRunner.__call__``."""
        seen = prefill.attention.get(i)

        def again() -> Any:
            prefill.decisions.pop(i, None)
            prefill.attention[i] = seen
            return self._run(runner, prefill, i, hidden, rope)

        if i == self.first:
            self.timer.filling.on = self.looks
            self.stage, before = self.timer.many(again), Launcher.launches
            self.timer.filling.on = True
            again()
            self.launches, self.path = Launcher.launches - before, prefill.prompt.stages[i].path
        return again()

    def read(self, attn: Any, hidden: Any, rope: Any, prefill: Any, clock: Any) -> None:
        """In the place of ``read_attention``."""
        if attn.layer_idx + 1 == self.first:
            self.reading = self.timer.many(lambda: self._read(attn, hidden, rope, prefill, clock))
            prefill.prompt.marks.chosen.clear()  # every reading has left one
        self._read(attn, hidden, rope, prefill, clock)

    @contextmanager
    def placed(self) -> Iterator[None]:
        """Inside, it stands in their places."""

        def run(*args: Any) -> Any:
            return self.run(*args)

        with put(StageRunner, "__call__", run), put(engine, "read_attention", self.read):
            yield


Road = dict[str, vlmprune.PruningPolicy | None]


def measure(model: Any, batch: dict[str, Any], policy: vlmprune.PruningPolicy, timer: Timer) -> list[Line]:
    """A policy's line on every road."""
    roads = {"ops": by_itself(policy), "fused": policy}
    times = prefills(model, batch, {"unpruned": None, **roads}, timer)
    lines = []
    for road, own in roads.items():
        probe = Probe(own.layers[0], timer, looks=road == "ops" or isinstance(own, vlmprune.Feather))
        with vlmprune.prune(model, own):
            for _ in range(WARM_UP):
                model(**batch, logits_to_keep=1)
            with probe.placed():
                model(**batch, logits_to_keep=1)
        assert probe.path.startswith("one pass (triton)") == (road == "fused"), probe.path
        added = times[road] - times["unpruned"]
        name = type(policy).__name__
        lines.append(Line(name, road, probe.path, probe.stage, probe.reading, added, probe.launches))
    return lines


def prefills(model: Any, batch: dict[str, Any], roads: dict[str, Any], timer: Timer) -> dict[str, float]:
    """Median time of a whole prefill on each road; they take turns, so that a slower minute slows them all."""
    times: dict[str, list[float]] = {road: [] for road in roads}
    for _ in range(timer.s.turns):
        for road, policy in roads.items():
            with nullcontext() if policy is None else vlmprune.prune(model, policy):
                for _ in range(WARM_UP):
                    model(**batch, logits_to_keep=1)
                runs = range(timer.s.prefills)
                times[road] += [timer.once(lambda: model(**batch, logits_to_keep=1)) for _ in runs]
    return {road: median(taken) for road, taken in times.items()}


def decode_steps(model: Any, batch: dict[str, Any], timer: Timer) -> dict[str, float]:
    """Median time of a decode step, unpruned and behind a pruned prefill."""
    taken = {}
    for name, policy in {"unpruned": None, "pruned": POLICIES[0]}.items():
        with nullcontext() if policy is None else vlmprune.prune(model, policy):
            step = {"past_key_values": model(**batch, logits_to_keep=1).past_key_values}
            step |= {"input_ids": torch.full((1, 1), WORD)}
            step |= {"position_ids": torch.full((1, 1), batch["input_ids"].shape[1])}
            taken[name] = timer.many(lambda step=step: model(**step))
    return taken


@torch.no_grad()
def run(s: Setting) -> dict[str, Any]:
    """Everything, as plain data."""
    model, batch, lines = make_model(s.layers, s.side, s.text), make_prompt(s.side, s.text), []
    with launching() as filling:
        timer = Timer(filling, s)
        for policy in POLICIES:
            lines += measure(model, batch, policy, timer)
        decode = decode_steps(model, batch, timer)
    stages = [asdict(line) for line in lines]
    return {"where": where(), "setting": asdict(s), "stages": stages, "decode": decode}


def where() -> str:
    """What it ran on."""
    load = f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    return f"triton {triton.__version__}, torch {torch.__version__}, Python {platform.python_version()}, {cpu()}, {load}"


def table(found: dict[str, Any]) -> str:
    """The lines, in microseconds."""
    s, decode = found["setting"], found["decode"]
    out = [
        found["where"],
        f"CPU time in us; {s['layers']} empty layers, {s['side'] ** 2} visual and {s['text']} text tokens",
        f"{'':12} {'road':6} {'stage':>7} {'reading':>8} {'prefill adds':>13} {'launches':>9}  path",
    ]
    for line in found["stages"]:
        reading = "-" if line["reading"] is None else f"{line['reading']:.1f}"
        out.append(
            f"{line['policy']:12} {line['road']:6} {line['stage']:7.1f} {reading:>8} {line['added']:13.1f} "
            f"{line['launches']:9}  {line['path']}"
        )
    step, more = decode["pruned"], decode["pruned"] - decode["unpruned"]
    return "\n".join([*out, f"decode step: {step:.1f}, of which pruning {more:.1f}"])


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--small", action="store_true", help="a small model, few calls: to try the script")
    args = parser.parse_args()
    if triton.knobs.runtime.interpret:
        raise SystemExit("bench_stage: expected TRITON_INTERPRET=0, got the interpreter")
    torch.set_num_threads(1)
    found = run(SMALL if args.small else Setting())
    print(json.dumps(found) if args.json else table(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
