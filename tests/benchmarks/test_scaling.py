"""Cost against tokens, images and batch: exponents of known laws, a tiny run end to end, and decode steps by hand."""

import json
import math
import re
from pathlib import Path

import pytest
import scaling
import torch
from latency import decode
from micro.shapes import LLAVA, QWEN, SHAPES, Shape
from scale import measure as timing
from scale import results
from scale.fit import fits, power
from scale.measure import PHASES, UNPRUNED, Point, measure
from scale.model import SIZES, make_model, make_prompt

from vlmprune.flops import DecoderShape

ROOT = Path(__file__).parents[2]
KEPT = ROOT / "benchmarks" / "results" / "scaling_cpu"
pytestmark = pytest.mark.cpu("a benchmark, tried at a tiny size")


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr("sys.argv", ["scaling", *arguments])
    code = scaling.main()
    return code, capsys.readouterr().out


def test_a_power_law_has_its_exponent_and_no_error():
    x = [576, 1024, 4096, 32768]
    assert power(x, [3e-4 * n**1.5 for n in x]) == (pytest.approx(1.5), pytest.approx(0, abs=1e-9))
    assert power([1, 2], [5.0, 20.0]) == (pytest.approx(2.0), None)
    with pytest.raises(ValueError, match=r"^x: expected two different values at least, got \[7\]$"):
        power([7, 7], [1.0, 2.0])


def test_the_error_of_an_exponent_is_that_of_least_squares():
    x, y = (
        [1, math.e, math.e**2],
        [1.0, math.exp(1.3), math.exp(2.0)],
    )  # logs 0 1 2 and 0 1.3 2: slope 1, off 0.3
    slope, error = power(x, y)
    left = (0.1**2 + 0.2**2 + 0.1**2) / (3 - 2)  # residuals -0.1 0.2 -0.1
    assert slope == pytest.approx(1.0) and error == pytest.approx(math.sqrt(left / 2))


def test_a_tiny_run_end_to_end(monkeypatch, capsys, tmp_path):
    out, policies = tmp_path / "rows", ["unpruned", "uniform:layer=1,keep=0.25", "divprune:keep=0.25"]
    options = [
        "--size",
        "tiny",
        "--repeat",
        "1",
        "--tokens",
        "64",
        "144",
        "--images",
        "1",
        "2",
        "--batch",
        "1",
        "3",
    ]
    code, shown = run(monkeypatch, capsys, *options, "--policies", *policies, "--out", str(out))
    assert code == 0 and "time = c x^e" in shown and "medians on" in shown
    rows = results.read(out.with_suffix(".csv"))
    assert [(r["axis"], r["policy"], r["at"]) for r in rows] == [
        (axis, policy, at)
        for axis, places in (("visual", ("64", "144")), ("images", ("1", "2")), ("batch", ("1", "3")))
        for policy in policies
        for at in places
    ]
    for row in rows:
        seen = int(row["tokens"]) * int(row["images"])
        assert int(row["kept"]) == (seen if row["policy"] == UNPRUNED else seen // 4)
        assert (row["selection_median_ms"] == "") == (row["policy"] == UNPRUNED)
        assert all(float(row[f"{phase}_median_ms"]) > 0 for phase in PHASES if row[f"{phase}_median_ms"])
    assert out.with_suffix(".png").stat().st_size > 1000
    # measured again, the last line of a point counts
    again = [*options[:4], "--axis", "batch", "--tokens", "64", "--batch", "1", "--policies", UNPRUNED]
    run(monkeypatch, capsys, *again, "--out", str(out))
    lines = out.with_suffix(".csv").read_text().splitlines()
    assert len(lines) == 1 + len(rows) + 1 and len(results.read(out.with_suffix(".csv"))) == len(rows)
    monkeypatch.setattr(scaling, "LEAST", 64)
    _, shown = run(monkeypatch, capsys, "--show", "--out", str(out))
    found = json.loads(out.with_suffix(".json").read_text())["fits"]
    assert {x["axis"] for x in found} == {"visual", "images", "batch"} and "divprune" in shown


def test_pairs_are_not_compared_of_too_many(monkeypatch):
    chosen = scaling.arguments().parse_args(["--tokens", "8100", "16384", "--axis", "visual"])
    asked = [(p.policy.partition(":")[0], p.tokens) for p in scaling.points(chosen)]
    assert ("divprune", 8100) in asked and ("divprune", 16384) not in asked
    assert ("fastv", 16384) in asked and ("unpruned", 16384) in asked
    chosen = scaling.arguments().parse_args(["--tokens", "576", "--axis", "images", "batch"])
    assert [(p.tokens, p.images, p.batch, p.at) for p in scaling.points(chosen) if p.policy == UNPRUNED] == [
        *((576, n, 1, n) for n in scaling.IMAGES),
        *((576, 1, n, n) for n in scaling.BATCHES),
    ]


def test_lines_of_two_machines_are_not_mixed(tmp_path):
    path = tmp_path / "rows.csv"
    row = {"device": "a", "size": "tiny", "dtype": "float32", "attention": "sdpa", "axis": "batch"}
    for device in ("a", "b"):
        results.append(path, row | {"device": device, "policy": "x", "at": 1})
    with pytest.raises(SystemExit, match=r"rows\.csv: expected lines of one device, got a, b$"):
        results.read(path)


def test_what_cannot_be_done_is_said(monkeypatch, capsys, tmp_path):
    for options, said in (
        (["--show", "--out", str(tmp_path / "no")], "--show: expected"),
        (["--repeat", "0"], "--repeat: expected at least 1, got 0"),
        (["--tokens", "576", "2048"], "--tokens: expected square numbers, got 2048"),
    ):
        with pytest.raises(SystemExit):
            run(monkeypatch, capsys, *options)
        assert said in capsys.readouterr().err
    model = make_model(SIZES["tiny"], torch.device("cpu"), torch.float32, "sdpa")
    model.lm_head.weight.data[0, 0] = torch.nan
    with pytest.raises(RuntimeError, match=r"^logits: expected finite numbers, got "):
        measure(model, Point("visual", UNPRUNED, 16), 1, 0.0)


def test_the_first_prefill_is_not_timed_and_a_second_always_is(monkeypatch):
    turns = iter([1e9, 3.0, 5.0, 7.0])
    monkeypatch.setattr(timing, "_once", lambda *_: {"prefill": next(turns), "decode": 1.0})
    model = make_model(SIZES["tiny"], torch.device("cpu"), torch.float32, "sdpa")
    found = measure(model, Point("visual", UNPRUNED, 16), 3, seconds=60.0)
    assert (found["runs"], found["prefill_median_ms"]) == (3, 5.0)
    turns = iter([1e9, 3.0])
    assert measure(model, Point("visual", UNPRUNED, 16), 3, seconds=0.0)["prefill_median_ms"] == 3.0


def test_the_prompt_has_the_tokens_asked_for():
    model = make_model(SIZES["tiny"], torch.device("cpu"), torch.float32, "sdpa")
    prompt = make_prompt(model, 100, images=2, batch=3)
    assert prompt["input_ids"].shape == (3, 35 + 2 * 101 + 29) and len(prompt["pixel_values"]) == 6
    assert (prompt["input_ids"] == 9).sum(1).tolist() == [200] * 3
    assert model(**prompt).logits.shape[:2] == (3, 266)
    assert SIZES["llava-1.5-7b"].hidden == LLAVA.hidden and SIZES["llava-1.5-7b"].layers == LLAVA.layers


def test_bytes_of_a_decode_step_by_hand():
    """LLaVA-1.5: 202,375,168 numbers a layer, 131,334,144 in the head; 8,192 of KV a token and layer."""
    assert decode.weight_bytes(LLAVA, 32064) == 2 * (32 * 202_375_168 + 131_334_144) == 13_214_679_040
    small = DecoderShape(layers=2, hidden=8, heads=2, kv_heads=1, head_dim=4, intermediate=16)
    # q 8x8, k 8x4, v 8x4, o 8x8, three of 8x16, twice; a head of 10 rows
    assert decode.weight_bytes(small, 10) == 2 * (2 * (64 + 32 + 32 + 64 + 3 * 128) + 80)
    assert decode.kv_bytes(small, [5, 3]) == 2 * 2 * 4 * 8
    x = decode.step(Shape("llava-1.5-7b", LLAVA, 576, 64), 1)
    assert x.full == 32 * 640 * 8192 * 2 and x.pruned == (2 * 640 + 30 * 128) * 8192 * 2
    unpruned, pruned = x.milliseconds("H200")
    assert unpruned == pytest.approx((13_214_679_040 + 335_544_320) / 4.1e12 * 1e3)
    assert x.faster == pytest.approx(unpruned / pruned)
    assert x.milliseconds("H200", "better")[0] < unpruned < x.milliseconds("H200", "worse")[0]
    assert decode.weight_bytes(QWEN, 152064) == pytest.approx(14.14e9, rel=1e-3)


def test_pruning_saves_more_the_longer_the_prompt_and_the_larger_the_batch():
    steps = {(s.name, b): decode.step(s, b) for s in SHAPES for b in decode.BATCHES}
    assert all(x.faster > 1 for x in steps.values())
    for b in decode.BATCHES:
        qwen = [steps[s.name, b].faster for s in SHAPES if s.name.startswith("qwen")]
        assert qwen == sorted(qwen)
    assert all(steps[s.name, 16].faster > steps[s.name, 1].faster for s in SHAPES)


def shown_in_readme(command):
    text = (ROOT / "benchmarks" / "README.md").read_text()
    return (
        re.search(rf"<!-- `{re.escape(command)}` -->\n(.*?)\n<!-- end -->", text, re.DOTALL)
        .group(1)
        .splitlines()
    )


def test_the_readme_shows_the_predictions(monkeypatch, capsys):
    command = "python -P benchmarks/scaling.py --predict --markdown"
    _, made = run(monkeypatch, capsys, "--predict", "--markdown")
    assert shown_in_readme(command) == made.splitlines(), f"out of date: {command}"
    _, table = run(monkeypatch, capsys, "--predict")
    assert "predicted, not measured" in table


def test_the_readme_shows_what_was_measured(monkeypatch, capsys):
    """The exponents kept beside the rows are those of the rows, and so are the README's."""
    command = "python -P benchmarks/scaling.py --show --markdown --out benchmarks/results/scaling_cpu"
    _, made = run(monkeypatch, capsys, "--show", "--markdown", "--out", str(KEPT))
    assert shown_in_readme(command) == made.splitlines(), f"out of date: {command}"
    found = fits(results.read(KEPT.with_suffix(".csv")), scaling.LEAST)
    kept = json.loads(KEPT.with_suffix(".json").read_text())["fits"]
    assert kept == [x._asdict() for x in found]


def test_selection_measured_is_linear_but_for_all_pairs():
    """In the rows kept: nowhere faster than n, and n^2 where the policy says so."""
    found = fits(results.read(KEPT.with_suffix(".csv")), scaling.LEAST)
    selection = {
        x.policy.partition(":")[0]: x.exponent for x in found if (x.axis, x.phase) == ("visual", "selection")
    }
    assert 1.8 < selection.pop("divprune") < 2.4  # counted: 2.0; the pairs outgrow the caches
    assert selection and all(exponent < 1.2 for exponent in selection.values()), selection


def test_decode_measured_is_faster_after_pruning_from_4096_tokens_on():
    """In the rows kept."""
    rows = [row for row in results.read(KEPT.with_suffix(".csv")) if row["axis"] == "visual"]
    steps = {(row["policy"], int(row["at"])): float(row["decode_median_ms"]) for row in rows}
    pruned = {key: ms for key, ms in steps.items() if key[0] != UNPRUNED and key[1] >= 4096}
    assert len(pruned) >= 10
    assert all(ms < steps[UNPRUNED, at] for (_, at), ms in pruned.items())
