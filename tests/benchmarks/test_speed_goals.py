"""The goals of whole models: met, missed or unmeasured, of what ``vlmprune bench`` itself writes."""

import json

import pytest
from gpu_day import speed_goals as goals

from vlmprune.bench import SHAPES, Row, Spread


def row(method, way="plain", batch=1, kept=320, reason=None, **seconds):
    ratio = {"prefill": 1.0, "total": 1.0} if method == "unpruned" else {"prefill": 4.0, "total": 3.0}
    made = Row(
        arm=f"{method} {way}",
        method=method,
        way=way,
        batch=batch,
        reason=reason,
        stages=() if method == "unpruned" else ((2, 2880, kept),),
        seconds={phase: Spread(s, s, s) for phase, s in seconds.items()},
        roofline=ratio if seconds else {},
    )
    return json.loads(json.dumps(made.as_dict()))


def results(*rows, model="llava-next-7b", device="NVIDIA H200", batch=(1,)):
    settings = {"model": model, "device": device, "batch": [*batch]}
    return {"settings": settings, "rows": [*rows]}


RUN = results(
    row("unpruned", prefill=0.5, total=1.0),
    row("unpruned", "graphs", prefill=0.4, total=0.9),  # the faster one is compared with
    row("a", prefill=0.2, total=0.7, selection=0.00009),
    row("a", "graphs", prefill=0.1, total=0.5, selection=0.0),
    row("b", prefill=0.11, total=0.2, kept=400, selection=0.0002),  # keeps too many
    row("b", "smaller image", prefill=0.01, total=0.01),
    row("c", "graphs", reason="no GPU"),
)


def test_met_missed_and_unmeasured():
    lines = [*goals.verdicts(goals.Results([RUN]))]
    roofline, times = (
        "of the roofline ratio,",
        "times as fast with 320 of 2,880 tokens, llava-next-7b, batch 1",
    )
    assert lines == [
        f"unmeasured  prefill at least 0.90 {roofline} llava-1.5-7b, batch 1",
        f"met         prefill at least 0.95 {roofline} llava-next-7b, batch 1: a: 1.00 (4.00 of 4.00)",
        f"missed      prefill at least 0.95 {roofline} llava-next-7b, batch 1: b: 0.91 (3.64 of 4.00)",
        f"unmeasured  prefill at least 0.95 {roofline} llava-1.5-7b, batch 16",
        f"met         prefill 2.7 {times}: 4.00 (a)",
        f"missed      total 2.1 {times}: 1.80 (a)",
        "met         selection under 0.1 ms, llava-next-7b: 0.090 ms (a plain)",
        "missed      selection under 0.1 ms, llava-next-7b: 0.200 ms (b plain)",
    ]


def test_batches_are_apart_and_the_last_run_counts():
    rows = [row("unpruned", batch=n, prefill=1.0) for n in (1, 16)]
    both = results(*rows, row("a", batch=16, prefill=0.25), model="llava-1.5-7b", batch=(1, 16))
    later = results(row("unpruned", prefill=1.0), row("a", prefill=0.3), model="llava-1.5-7b")
    lines = [*goals.verdicts(goals.Results([both, later]))]
    assert [line.split()[0] for line in lines[:3]] == ["missed", "unmeasured", "met"]


@pytest.mark.parametrize(
    "run",
    [
        results(*RUN["rows"], device="cpu, 2 threads"),
        results(row("unpruned", reason="out of memory at batch 1"), row("a", prefill=1.0)),
    ],
)
def test_what_does_not_count(run):
    assert {line.split()[0] for line in goals.verdicts(goals.Results([run]))} == {"unmeasured"}


def test_goals_name_shapes_that_exist():
    assert {shape for shape, _, _ in goals.OF_ROOFLINE} | {goals.NEXT} <= SHAPES.keys()


def test_folders_are_read_in_the_order_of_writing(tmp_path, monkeypatch, capsys):
    for name in ("b", "a"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(RUN))
    monkeypatch.setattr("sys.argv", ["speed_goals.py", str(tmp_path)])
    assert len(goals.read([tmp_path])) == 2 and goals.main() == 0
    assert "met         prefill 2.7" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["speed_goals.py"])
    assert goals.main() == 2
