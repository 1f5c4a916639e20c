"""A whole benchmark on a model of six small layers: what is in its rows, how ratios are paired, what is written."""

import csv
import doctest
import io
import json

import pytest
import torch

from helpers.families import CASES, build
from vlmprune import Custom, Feather, bench, ops
from vlmprune.bench import benchmark, measure, roofline, rows, shapes
from vlmprune.bench.arms import Arm
from vlmprune.bench.measure import Measured, Ticks
from vlmprune.bench.peaks import measure_peaks
from vlmprune.bench.prompts import Prompt
from vlmprune.bench.roofline import Decoder, Peaks
from vlmprune.bench.rows import Counter, make_rows, spread, to_csv
from vlmprune.errors import InputError
from vlmprune.flops import DecoderShape

PEAKS = Peaks(1e11, 1e10)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Peak rates have a test of their own; kernels too."""
    monkeypatch.setattr("vlmprune.bench.benchmark.measure_peaks", lambda device, dtype: PEAKS)
    with ops.use_backend("reference"):
        yield


@pytest.fixture(scope="module")
def tiny():
    return bench.FullSize("tiny", device="cpu")


def test_rows(tiny, tmp_path):
    told = []
    found = bench.run(
        tiny,
        ["fastv:layer=2,keep=4"],
        tmp_path / "out",
        batch=(1, 2),
        new_tokens=3,
        rounds=2,
        warm_up=0,
        progress=lambda *args: told.append(args),
    )
    names = ["unpruned", "unpruned + graphs"]
    names += [
        f"fastv:layer=2,keep=4{way}" for way in ("", " + graphs", " [smaller image]", " [published style]")
    ]
    assert [(row.batch, row.arm) for row in found.rows] == [(n, name) for n in (1, 2) for name in names]
    assert told[-1] == ("batch 2, round 2 of 2", 24, 24)
    unpruned, graphs, pruned, _, small, published = found.rows[:6]
    assert graphs.reason and graphs.seconds == {} == graphs.speedup
    assert unpruned.speedup == dict.fromkeys(measure.PHASES, (1.0, 1.0, 1.0))
    assert (pruned.stages, pruned.visual_tokens, small.visual_tokens) == (((2, 16, 4),), 16, 4)
    assert published.stages == pruned.stages and not published.paths
    assert published.kv_bytes == pruned.kv_bytes < unpruned.kv_bytes
    for row in (unpruned, pruned, small, published):
        assert row.seconds.keys() >= {*measure.PHASES} and row.kv_bytes > 0
        assert row.seconds["vision"].median + row.seconds["prefill"].median <= row.seconds["ttft"].median
        assert row.seconds["ttft"].median < row.seconds["total"].median
        assert row.tokens_per_second == pytest.approx(3 / row.seconds["total"].median)
        assert row.answers_per_second == pytest.approx(row.tokens_per_second / 3)
    assert pruned.flops == published.flops and pruned.roofline == published.roofline
    assert pruned.policy.startswith("FastV(") and published.policy is None
    assert 0 < pruned.seconds["selection"].median < pruned.seconds["prefill"].median
    assert found.rows[6].kv_bytes == 2 * unpruned.kv_bytes

    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        *("results.json", "results.csv", "speedups.png", "throughput.png")
    }
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == json.loads(
        json.dumps(found.as_dict())
    )
    lines = list(csv.DictReader(io.StringIO((tmp_path / "out" / "results.csv").read_text())))
    (line,) = [x for x in lines if (x["arm"], x["batch"], x["phase"]) == (pruned.arm, "1", "prefill")]
    assert float(line["flops_ratio"]) == pruned.flops["prefill"]
    assert float(line["speedup_p80"]) == pruned.speedup["prefill"].p80
    assert [x["reason"] for x in lines if x["arm"] == graphs.arm] == [graphs.reason] * 2


def test_flops_are_those_of_the_report(tiny):
    found = bench.run(
        tiny, [Feather(layers=(2, 4), keep=0.3)], baselines=False, rounds=1, new_tokens=2, warm_up=0
    )
    row = found.rows[2]
    with Arm("x", "plain", Prompt(), Feather(layers=(2, 4), keep=0.3)).scope(tiny.model) as run:
        measure.answer(tiny.model, Prompt().inputs(tiny.config, 1, tiny.model.device, torch.float32), 1)
        flops = run.report().flops
    assert row.flops["prefill"] == flops.full / flops.pruned > 1
    assert row.method == "Feather(layers=(2, 4))" and row.policy == repr(Feather(layers=(2, 4), keep=0.3))


def test_a_policy_that_is_no_data(tiny):
    policy = Custom(layer=2, select=lambda context: torch.arange(5)[None])
    found = bench.run(tiny, [policy], baselines=False, rounds=1, new_tokens=1, warm_up=0)
    assert found.rows[2].stages == ((2, 16, 5),) and found.rows[2].policy == repr(policy)


def test_a_checkpoint_of_any_family():
    subject = bench.Checkpoint.of(build(CASES["qwen3vl"]), None)
    found = bench.run(subject, ["uniform:layer=2,keep=16"], images=2, rounds=1, new_tokens=1, warm_up=0)
    rows = {row.arm: row for row in found.rows}
    assert rows["unpruned"].visual_tokens == 2 * 32 * 32
    assert rows["uniform:layer=2,keep=16 [smaller image]"].visual_tokens == 2 * 16
    assert "decode" not in rows["unpruned"].seconds and rows["unpruned"].roofline["total"] == 1


def taken(seconds, **others):
    return {"prefill": seconds, "total": 2 * seconds} | others


def test_ratios_are_paired_round_by_round(tiny):
    """The device slows down from round to round; the ratio does not."""
    shape = DecoderShape(layers=6, hidden=64, heads=4, kv_heads=4, head_dim=16, intermediate=128)
    counter = Counter(Decoder(shape, 100, 4), 1000, PEAKS, new_tokens=2)
    arms = [Arm("unpruned", "plain", Prompt()), Arm("a", "plain", Prompt()), Arm("b", "plain", Prompt())]
    with arms[0].scope(tiny.model) as run:
        measure.answer(tiny.model, Prompt().inputs(tiny.config, 1, tiny.model.device, torch.float32), 1)
        report = run.report()
    base = Measured([taken(1.0), taken(2.0), taken(4.0)], [0.0] * 3, report, 81)
    other = Measured([taken(0.5), taken(1.0), taken(1.0, vision=3)], [0.0] * 3, report, 81)
    one, two, lost = make_rows(arms, 1, [base, other, Measured(reason="out of memory at batch 1")], counter)
    assert two.speedup["prefill"] == spread([2.0, 2.0, 4.0]) == (2.0, 2.0, pytest.approx(3.2))
    assert "vision" not in two.seconds  # not seen in every round
    assert one.seconds["prefill"].median == 2.0 and lost.reason.startswith("out of memory")
    without = make_rows(arms[:2], 1, [Measured(reason="out of memory at batch 1"), other], counter)
    assert without[1].speedup == {} == without[1].flops and without[1].seconds["prefill"].median == 1.0
    assert to_csv(without).count("\n") == 4


def test_what_runs_out_of_memory_is_a_row_and_the_others_go_on(tiny, monkeypatch):
    calls, take = [], measure.take_time

    def lose_second(*args):
        calls.append(args)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("no")
        return take(*args)

    monkeypatch.setattr(measure, "take_time", lose_second)
    found = bench.run(tiny, ["fastv:keep=4"], baselines=False, rounds=3, new_tokens=1, warm_up=0)
    assert len(calls) == 4  # of the first arm three rounds
    assert found.rows[2].reason == "out of memory at batch 1" and found.rows[0].reason is None


def test_an_event_is_made_and_waited_for_on_a_gpu(monkeypatch):
    made = []

    class Event:
        def __init__(self, enable_timing):
            made.append(self)

        def record(self, stream):
            self.stream = stream

        def synchronize(self):
            self.waited = True

        def elapsed_time(self, other):
            return 7.0 * (made.index(other) - made.index(self))

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    ticks = Ticks(torch.device("cuda:1"))
    scores = torch.zeros(1)
    assert ticks(None, scores) is scores and ticks(None, scores) is scores
    assert ticks.between(0, -1) == pytest.approx(0.014) and len(made) == 3
    assert all(event.stream == "stream of cuda:1" for event in made) and made[2].waited


def test_peaks_of_this_machine(monkeypatch):
    monkeypatch.setattr("vlmprune.bench.peaks.SIDE", {"cpu": 64})
    monkeypatch.setattr("vlmprune.bench.peaks.NUMBERS", {"cpu": 1000})
    monkeypatch.setattr("vlmprune.bench.peaks.SECONDS", 0.0)
    monkeypatch.setattr("vlmprune.bench.peaks._seconds", lambda call, device: 0.5)
    assert measure_peaks(torch.device("cpu"), torch.bfloat16) == Peaks(2 * 64**3 / 0.5, 2 * 4 * 1000 / 0.5)


@pytest.mark.parametrize("module", [benchmark, roofline, rows, shapes], ids=lambda module: module.__name__)
def test_examples(module):
    found = doctest.testmod(module)
    assert found.attempted and not found.failed


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"rounds": 0}, "rounds: expected at least 1, got 0"),
        ({"new_tokens": 0}, "new_tokens: expected at least 1, got 0"),
        ({"warm_up": -1}, "warm_up: expected at least 0, got -1"),
        ({"images": 0}, "images: expected at least 1, got 0"),
        ({"batch": ()}, "batch: expected numbers of at least 1, got none"),
        ({"batch": (4, 0)}, "batch: expected numbers of at least 1, got 4,0"),
        ({"out": "/none/out"}, "out: expected a folder inside an existing one"),
        ({"profile": "/none/trace.json"}, "profile: expected a file in an existing folder"),
        ({"policies": ["fastv:layer=6"]}, "layer: expected at most 5"),
    ],
)
def test_bad_input_is_told_before_the_model_is_made(changes, said):
    subject = bench.FullSize("tiny", device="cpu")
    with pytest.raises(InputError, match=said):
        bench.run(subject, **changes)
    assert "model" not in vars(subject)
