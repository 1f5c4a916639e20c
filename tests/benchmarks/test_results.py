"""Times, rows, tables and plots: what a measurement turns into."""

import dataclasses

import pytest
import torch
from micro import clock
from micro.cases import CASES
from micro.clock import MIN_RUNS, Timing, measure, modes, summary
from micro.plot import draw
from micro.providers import Provider
from micro.rows import Row, append, latest, read, refused, result
from micro.shapes import SHAPES, TINY, Setting
from micro.sweep import Sweep
from micro.table import HEADS, cells, show

from helpers.micro_cases import make_ceilings, make_inputs

CPU = torch.device("cpu")
SELECT = next(case for case in CASES if case.op == "select_topk")
MERGE = next(case for case in CASES if case.op == "merge_tokens")


def test_percentiles_are_runs_that_happened():
    assert summary("call", [5.0, 1.0, 4.0, 2.0, 3.0]) == Timing("call", 5, median=3.0, p20=2.0, p80=4.0)


def test_measure_runs_at_least_a_few_times():
    calls = []
    timing = measure(lambda: calls.append(1), CPU, "call", seconds=0.0)
    assert timing.runs == MIN_RUNS and len(calls) == MIN_RUNS + 1  # the first warms up
    assert 0 < timing.p20 <= timing.median <= timing.p80
    assert modes(CPU) == ("call",)


def test_a_graph_is_measured_without_what_every_graph_pays(monkeypatch):
    monkeypatch.setattr(clock, "_graph_times", lambda run, device, copies: iter([run()] * 3))
    clock.graph_overhead.cache_clear()
    monkeypatch.setattr(torch.Tensor, "fill_", lambda self, value: 2.5)
    try:
        assert measure(lambda: 10.0, CPU, "graph", 0.0) == Timing("graph", 3, 7.5, 7.5, 7.5, overhead=2.5)
        assert measure(lambda: 10.0, CPU, "hot", 0.0) == Timing("hot", 3, 10.0, 10.0, 10.0)
    finally:
        clock.graph_overhead.cache_clear()


def test_the_cache_is_filled_by_reading(monkeypatch):
    """Lines that were written would leave the cache in the time of what is measured."""
    data = torch.zeros(8)
    monkeypatch.setattr(clock, "_other_data", lambda device: data)
    with torch.profiler.profile() as profile:
        clock._fill_l2(CPU)
    assert "aten::sum" in {event.name for event in profile.events()} and data._version == 0


def test_shares_follow_from_the_ceilings():
    x = make_inputs()
    row = result(MERGE, x, "torch", Timing("call", 3, 100.0, 90.0, 110.0), make_ceilings())
    traffic = MERGE.traffic(x)
    assert row.bytes == traffic and row.gb_per_s == pytest.approx(traffic / 100e3, rel=1e-3)
    assert row.floor_us == pytest.approx(traffic / 1e3, rel=1e-3)
    assert row.share_of_floor == pytest.approx(row.floor_us / 100, rel=1e-3)
    assert row.prefill_us == pytest.approx(TINY.prefill_flops / 1e6, rel=1e-3)
    assert row.share_of_prefill == pytest.approx(100 / row.prefill_us, rel=1e-3)


def test_prefill_flops_by_hand():
    S, d, m = 68, 64, 128
    matrices = 2 * d * 64 + 2 * d * 32 + 3 * d * m
    causal = 4 * S * S * 64 - 2 * S * (S - 1) * 64
    assert TINY.prefill_flops == 2 * (2 * S * matrices + causal)


def test_rows_survive_the_file(tmp_path):
    x, path = make_inputs(), tmp_path / "new" / "rows.csv"
    old = result(SELECT, x, "torch", Timing("call", 3, 9.0, 8.0, 10.0), make_ceilings())
    for row in (old, refused(SELECT, x, "cuda", "no GPU"), dataclasses.replace(old, median_us=7.0)):
        append(path, row)
    rows = read(path)
    assert [row["median_us"] for row in rows] == ["9.0", "", "7.0"] and rows[1]["note"] == "no GPU"
    assert [row["median_us"] for row in latest(rows)] == ["7.0"]
    assert rows[0]["torch"] == torch.__version__ and rows[0]["device"] == "cpu"
    assert all(rows[0][name] for name in ("date", "commit", "driver", "cuda", "python", "triton"))


def sweep(**changes):
    settings = dict(shapes=[TINY], dtypes=[torch.float32], rows=(1, 4), modes=("call",), seconds=0.0)
    return Sweep(CPU, **settings | changes)


def test_a_sweep_measures_what_runs_and_says_what_does_not():
    rows = list(sweep(cases=["select_topk", "row_lse"]).run(make_ceilings()))
    timed = [(row.case, row.rows, row.provider) for row in rows if row.median_us]
    both = ("reference", "torch")
    assert timed == [("row_lse", r, p) for r in (1, 4) for p in both] + [("select_topk", 0, p) for p in both]
    assert all(row.note for row in rows if not row.median_us)
    assert {row.provider for row in rows if not row.median_us} == {"triton", "cuda"}


def test_a_wrong_provider_is_not_timed(monkeypatch):
    wrong = Provider("wrong", lambda x: x.scores.topk(x.shape.keep).indices)
    case = dataclasses.replace(SELECT, torch=None, others=(wrong,))
    monkeypatch.setattr("micro.sweep.CASES", (case,))
    (row,) = sweep(providers=["wrong"]).run(make_ceilings())
    assert (
        row.note.startswith("wrong result: index: expected ascending") and row.median_us is None and row.bad
    )


def test_a_provider_that_breaks_leaves_the_others(monkeypatch):
    def broken(x):
        raise TypeError("launch() takes 3 arguments")

    others = (Provider("broken", broken), Provider("fine", SELECT.torch))
    monkeypatch.setattr("micro.sweep.CASES", (dataclasses.replace(SELECT, torch=None, others=others),))
    first, second = sweep(providers=["broken", "fine"]).run(make_ceilings())
    assert first.note == "failed: TypeError: launch() takes 3 arguments" and first.bad
    assert second.median_us is not None and not second.bad


def test_settings_leave_out_what_says_nothing_new():
    wide = sweep(shapes=SHAPES, dtypes=[torch.float32, torch.bfloat16], rows=(1, 64, 200))
    count = {case.name: 0 for case in CASES}
    for case, _ in wide.settings():
        count[case.name] += 1
    assert count["received_attention"] == 5 * 2 * 3
    assert count["gather_tokens"] == 5 * 2 and count["select_topk"] == 5
    assert count["greedy_select dpp"] == 3 * 2  # all pairs of 16k tokens are left out


def test_the_table_prints_without_rich(capsys, monkeypatch):
    x = make_inputs()
    timed = result(SELECT, x, "torch", Timing("call", 3, 1234.5, 8.0, 2e4), make_ceilings())
    assert len(cells(timed)) == len(HEADS) and cells(timed)[6:9] == ("1,234", "8", "20,000")
    monkeypatch.setattr("micro.table.find_spec", lambda name: None)
    show([timed, refused(SELECT, x, "cuda", "no GPU")], "title")
    out = capsys.readouterr().out
    assert "tiny 68 -> 20" in out and "not run: cuda (1 of 1 lines): no GPU" in out


def test_plots_are_drawn(tmp_path):
    pytest.importorskip("matplotlib").use("agg")
    from micro.inputs import Inputs

    path = tmp_path / "rows.csv"
    for shape in SHAPES[:2]:
        x = Inputs(Setting(shape, torch.float32, 1, torch.device("meta")))
        for case in (SELECT, next(c for c in CASES if c.scored)):
            x.device = CPU  # what the row says; nothing runs
            for provider in ("reference", "torch"):
                append(path, result(case, x, provider, Timing("call", 3, 9.0, 8.0, 10.0), make_ceilings()))
    (picture,) = draw(path, "call")
    assert picture.name == "rows-call-fp32-1-rows.png" and picture.stat().st_size > 10_000
    assert isinstance(read(path)[0], dict) and Row.__dataclass_fields__.keys() == read(path)[0].keys()
