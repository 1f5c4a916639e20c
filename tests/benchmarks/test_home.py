"""What comes back from a GPU is filed once, by device, with plots; and the tables of it."""

import csv
import json
import sys

import pytest
from gpu_day import home
from gpu_day.state import State
from micro.rows import Row, read

from vlmprune.bench import Row as ModelRow
from vlmprune.bench import Spread


def op_row(provider, median, shape="llava-1.5-7b", device="NVIDIA H200", mode="graph", **changes):
    known = dict(
        date="d", commit="c", device=device, driver="1", cuda="13.0", python="3", torch="2", triton="3"
    )
    known |= dict(case="prune_tokens", shape=shape, length=640, visual=576, kept=64, dtype="bf16", rows=1)
    known |= dict(provider=provider, mode=mode, median_us=median, floor_us=3.7, copy_gb_per_s=4100)
    return {name: "" for name in Row.__dataclass_fields__} | known | changes


def model_row(method, prefill):
    ratio = 1.0 if method == "unpruned" else 4.0
    row = ModelRow(
        arm=f"{method} plain",
        method=method,
        way="plain",
        batch=1,
        reason=None,
        stages=() if method == "unpruned" else ((2, 576, 64),),
        seconds={"prefill": Spread(prefill, prefill, prefill)},
        roofline={"prefill": ratio},
    )
    return row.as_dict()


@pytest.fixture
def brought(tmp_path, monkeypatch):
    """Return (a function that writes these rows and files them, the folder of results)."""
    results = tmp_path / "results"
    results.mkdir()

    def file(*rows, models=(), out=tmp_path / "out"):
        state = State(tmp_path / "state")
        if rows:
            with state.rows.open("w", newline="") as table:
                writer = csv.DictWriter(table, [*rows[0]])
                writer.writeheader()
                writer.writerows(rows)
        settings = {"model": "llava-1.5-7b", "device": "NVIDIA H200", "batch": [1]}
        (state.bench / "quick").mkdir(exist_ok=True)
        (state.bench / "quick" / "results.json").write_text(
            json.dumps({"settings": settings, "rows": [*models]})
        )
        out.mkdir(exist_ok=True)
        (state.folder / "learned" / "glyphworld").mkdir(parents=True, exist_ok=True)
        state.save(out)
        monkeypatch.setattr(
            sys,
            "argv",
            ["home.py", str(out), "--results", str(results), "--learned", str(tmp_path / "learned")],
        )
        return home.main()

    return file, results


def test_rows_are_filed_once_and_drawn(brought, capsys):
    file, results = brought
    rows = op_row("plan", 16), op_row("triton", 18), op_row("torch", 160), op_row("plan", 40, mode="call")
    models = [model_row("unpruned", 0.04), model_row("fastv", 0.0125)]
    assert file(*rows, models=models) == 0
    out = capsys.readouterr().out.splitlines()
    assert "| llava-1.5-7b | 576 -> 64 | 16 (plan) | 3.7 | 20 | 160 (10x) |  |  |  |" in out
    assert "| llava-1.5-7b | 1 | fastv | 3.20x | 4.00x |  |  |" in out
    names = {"nvidia-h200.csv", "nvidia-h200-bench"}
    names |= {f"nvidia-h200-{mode}-bf16-1-rows.png" for mode in ("graph", "call")}
    assert {path.name for path in results.iterdir()} == names
    assert file(*rows, op_row("cuda", 15), models=models) == 0
    assert "15 (cuda)" in capsys.readouterr().out
    assert len(read(results / "nvidia-h200.csv")) == len(rows) + 1


def test_what_was_trained_comes_home(brought, tmp_path):
    file, _ = brought
    file(op_row("plan", 16))
    assert (tmp_path / "learned" / "glyphworld").is_dir()


def test_every_card_has_its_table(brought):
    file, results = brought
    file(op_row("plan", 16), op_row("plan", 20, device="NVIDIA H100 80GB HBM3"))
    assert {path.name for path in results.glob("*.csv")} == {"nvidia-h200.csv", "nvidia-h100-80gb-hbm3.csv"}


def test_nothing_to_file(brought, tmp_path, monkeypatch, capsys):
    file, results = brought
    with pytest.raises(SystemExit):
        file()
    assert "expected rows in state.tar, got none: no op was timed" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["home.py", str(tmp_path / "elsewhere")])
    with pytest.raises(SystemExit):
        home.main()
    assert "folder: expected one with state.tar, got" in capsys.readouterr().err
    assert not [*results.iterdir()]
