"""What was measured as rows: medians, paired ratios to the unpruned model, and beside them the ratios of FLOPs and of the roofline."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from vlmprune.bench.arms import Arm
from vlmprune.bench.measure import PHASES, Measured
from vlmprune.bench.roofline import Decoder, Peaks
from vlmprune.flops import decoder_flops, layer_inputs, wave_flops
from vlmprune.models import Report


class Spread(NamedTuple):
    """Median, 20th and 80th percentile."""

    median: float
    p20: float
    p80: float


def spread(values: Sequence[float]) -> Spread:
    """Of at least one value; between two neighbours the line between them.

    >>> spread([4.0, 1.0, 2.0])
    Spread(median=2.0, p20=1.4, p80=3.2)
    """
    ranked = sorted(values)

    def at(share: float) -> float:
        low, rest = divmod(share * (len(ranked) - 1), 1)
        i = int(low)
        return ranked[i] + rest * (ranked[min(i + 1, len(ranked) - 1)] - ranked[i])

    return Spread(at(0.5), at(0.2), at(0.8))


@dataclass(frozen=True)
class Row:
    """One arm at one batch size. By phase (``PHASES``); a phase that was not seen is not there.

    Attributes:
        arm, method, way: its name, policy as typed or "unpruned", and how it ran.
        batch: samples at once.
        policy: with all its settings; None where nothing of ours prunes.
        reason: why it could not run; all below is empty then.
        graph: what ran in CUDA graphs, or why nothing did; None on the plain path.
        visual_tokens: of a sample, before pruning; ``stages`` are ``(layer, in, kept)``, and ``paths`` say how they ran.
        seconds: with "selection", which is part of prefill.
        speedup: unpruned over this arm, of the same round.
        flops, roofline: what that would be by FLOPs, and by the roofline.
        bound: the roofline's seconds.
        kv_bytes, peak_bytes, kernels: KV cache behind the prompt; most memory allocated and kernels launched by an
            answer of one token, both on a GPU only.
        answers_per_second, tokens_per_second: of the whole batch; new tokens.
    """

    arm: str
    method: str
    way: str
    batch: int
    policy: str | None = None
    reason: str | None = None
    graph: str | None = None
    visual_tokens: float = 0.0
    stages: tuple[tuple[int, int, int], ...] = ()
    paths: tuple[str, ...] = ()
    seconds: Mapping[str, Spread] = field(default_factory=dict)
    speedup: Mapping[str, Spread] = field(default_factory=dict)
    flops: Mapping[str, float] = field(default_factory=dict)
    roofline: Mapping[str, float] = field(default_factory=dict)
    bound: Mapping[str, float] = field(default_factory=dict)
    kv_bytes: int = 0
    peak_bytes: int | None = None
    kernels: int | None = None
    answers_per_second: float = 0.0
    tokens_per_second: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, ready for JSON."""
        out = asdict(self)
        for name in ("seconds", "speedup"):
            out[name] = {phase: value._asdict() for phase, value in getattr(self, name).items()}
        return out


@dataclass(frozen=True)
class Cost:
    """What a prompt costs by counting.

    Attributes:
        flops: by phase.
        bound: least seconds by phase.
    """

    flops: dict[str, float]
    bound: dict[str, float]


class Counter:
    """Counts what arms cost on one model."""

    def __init__(self, decoder: Decoder, tower_bytes: int, peaks: Peaks, new_tokens: int) -> None:
        """``tower_bytes`` are those of all weights of vision tower and projector."""
        self.decoder, self.tower, self.peaks, self.new_tokens = decoder, tower_bytes, peaks, new_tokens

    def cost(self, arm: Arm, batch: int, measured: Measured) -> Cost:
        """Of an arm that ran: from the tokens that entered each layer, and how many stay in the cache."""
        assert measured.report is not None
        decoder, peaks, steps = self.decoder, self.peaks, self.new_tokens - 1
        lengths, cached = _lengths(arm, measured.report, measured.inputs, decoder.shape.layers)
        grown = [n + steps / 2 for n in cached]  # in the middle of decoding
        vision = float(measured.report.flops.vision)
        wave = measured.report.second_wave
        rows = None if wave is None else (wave.layer, wave.width)
        spent = decoder_flops(decoder.shape, lengths) + wave_flops(decoder.shape, lengths, rows)
        flops = {"vision": vision, "prefill": float(batch * spent)}
        bound = {
            "vision": peaks.seconds(vision, self.tower),
            "prefill": decoder.prefill_seconds(lengths, batch, peaks),
        }
        if rows is not None:
            bound["prefill"] += decoder.wave_seconds(rows, lengths, batch, peaks)
            grown[: rows[0]] = [grown[rows[0]]] * rows[0]  # those layers hold the second wave's, too
        if steps:
            flops["decode"] = decoder.decode_flops(grown, batch)
            bound["decode"] = decoder.decode_seconds(grown, batch, peaks)
        for costs in (flops, bound):
            costs["ttft"] = costs["vision"] + costs["prefill"]
            costs["total"] = costs["ttft"] + steps * costs.get("decode", 0.0)
        return Cost(flops, bound)


def _lengths(arm: Arm, report: Report, inputs: int, layers: int) -> tuple[list[int], list[int]]:
    """Tokens that enter each layer, and those whose keys and values it holds behind the prompt."""
    text = inputs - round(report.visual_tokens)
    lengths = layer_inputs(
        layers, inputs, [(layer, text + after) for layer, _, after in _stages(arm, report)]
    )
    compact = arm.policy is not None and arm.policy.earlier_kv == "compact" and bool(report.stages)
    return lengths, [lengths[-1]] * layers if compact else lengths


def _stages(arm: Arm, report: Report) -> tuple[tuple[int, int, int], ...]:
    """Layer, visual tokens in and kept: of the published style no scope of ours has a record."""
    if arm.way != "published style":
        return report.stages
    before = [round(report.visual_tokens), *(after for _, after in arm.kept)]
    return tuple((layer, n, after) for (layer, after), n in zip(arm.kept, before, strict=False))


def make_rows(arms: Sequence[Arm], batch: int, found: Sequence[Measured], counter: Counter) -> list[Row]:
    """One row an arm; the first arm is what the others are compared with."""
    base = found[0]
    cost = counter.cost(arms[0], batch, base) if base.report is not None else None
    return [
        _row(arm, batch, one, counter, base, cost)
        if one.report is not None and one.reason is None
        else Row(arm.name, arm.method, arm.way, batch, reason=one.reason)
        for arm, one in zip(arms, found, strict=True)
    ]


def _row(
    arm: Arm, batch: int, one: Measured, counter: Counter, base: Measured, base_cost: Cost | None
) -> Row:
    report, cost = one.report, counter.cost(arm, batch, one)
    assert report is not None
    phases = [phase for phase in PHASES if all(phase in taken for taken in one.rounds)]
    seconds = {phase: spread([taken[phase] for taken in one.rounds]) for phase in phases}
    speedup: dict[str, Spread] = {}
    for phase in phases if base.reason is None else ():
        pairs = zip(base.rounds, one.rounds, strict=True)
        ratios = [was[phase] / now[phase] for was, now in pairs if phase in was]
        if ratios:
            speedup[phase] = spread(ratios)
    if all(one.selection):  # inside a graph no clock sees it
        seconds["selection"] = spread(one.selection)
    total = seconds["total"].median
    ours = arm.way in ("plain", "graphs") and arm.policy is not None
    return Row(
        arm=arm.name,
        method=arm.method,
        way=arm.way,
        batch=batch,
        policy=repr(arm.policy) if ours else None,
        graph=report.graph or None,
        visual_tokens=report.visual_tokens,
        stages=_stages(arm, report),
        paths=report.paths,
        seconds=seconds,
        speedup=speedup,
        flops={} if base_cost is None else _ratios(base_cost.flops, cost.flops),
        roofline={} if base_cost is None else _ratios(base_cost.bound, cost.bound),
        bound=cost.bound,
        kv_bytes=report.kv_bytes,
        peak_bytes=one.peak_bytes,
        kernels=one.kernels,
        answers_per_second=batch / total,
        tokens_per_second=batch * counter.new_tokens / total,
    )


def _ratios(base: Mapping[str, float], cost: Mapping[str, float]) -> dict[str, float]:
    return {phase: base[phase] / cost[phase] for phase in PHASES if cost.get(phase)}


def to_csv(rows: Sequence[Row]) -> str:
    """One line an arm, batch size and phase; what could not run has one line with its reason."""
    heads = ["arm", "method", "way", "batch", "phase", "median_s", "p20_s", "p80_s"]
    heads += ["speedup", "speedup_p20", "speedup_p80", "flops_ratio", "roofline_ratio", "bound_s"]
    heads += ["kv_bytes", "peak_bytes", "kernels", "answers_per_s", "tokens_per_s", "graph", "reason"]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(heads)
    for row in rows:
        first = [row.arm, row.method, row.way, row.batch]
        counts = [row.kv_bytes, row.peak_bytes, row.kernels, row.answers_per_second, row.tokens_per_second]
        last = [*counts, row.graph, row.reason]
        for phase in row.seconds or ("",):
            times, gain = row.seconds.get(phase, ("",) * 3), row.speedup.get(phase, ("",) * 3)
            counted = [some.get(phase, "") for some in (row.flops, row.roofline, row.bound)]
            writer.writerow([*first, phase, *times, *gain, *counted, *last])
    return out.getvalue()
