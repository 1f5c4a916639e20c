"""The scripts: the knobs of the sweep exist and are swept in time, the microbenchmark runs end to end."""

import microbench
import pytest
import tile_sweep
import torch
from micro.inputs import Inputs
from micro.restart import Journal
from micro.shapes import TINY, Setting

from helpers.micro_cases import make_ceilings


@pytest.mark.parametrize("knob", tile_sweep.KNOBS, ids=lambda knob: f"{knob.module}.{knob.name}.{knob.key}")
def test_every_knob_turns(knob):
    """Once, in the interpreter; a setting that a launcher no longer reads is not a knob."""
    x = Inputs(Setting(TINY, torch.float32, 2, torch.device("cpu")))
    case = next(case for case in tile_sweep.CASES if case.name == knob.case)
    assert tile_sweep.Variant(knob, knob.values[0]).timed(case, x, 0.0, ()) == []


def test_a_knob_is_set_back():
    from vlmprune.triton_kernels import gather_tokens

    (knob,) = [k for k in tile_sweep.KNOBS if (k.module, k.name) == ("gather_tokens", "BLOCK_K")]
    before = gather_tokens.BLOCK_K
    with knob.set(8):
        assert gather_tokens.BLOCK_K == 8
    assert before == gather_tokens.BLOCK_K


def sweep_lines(monkeypatch, medians, end=float("inf"), journal=None, rows=(1,)):
    """Lines of a sweep of two cases whose variants take what ``medians`` says, or raise it."""
    cases = ("gather_tokens", "received_attention")
    knobs = [knob for knob in tile_sweep.KNOBS if knob.case in cases and knob.key in (None, "BLOCK_N")]

    def timed(self, case, x, seconds, modes):
        found = medians.get(str(self), 9.0)
        if isinstance(found, Exception):
            raise found
        return [found]

    monkeypatch.setattr(tile_sweep, "KNOBS", knobs)
    monkeypatch.setattr(tile_sweep.Variant, "timed", timed)
    sweep = tile_sweep.Sweep(0.0, ("graph",), end, Journal(journal))
    return list(sweep.lines((TINY,), rows, torch.float32))


def test_a_sweep_names_the_best_and_survives_any_error(monkeypatch):
    medians = {"gather_tokens.BLOCK_K = 8": 7.0, "gather_tokens.BLOCK_K = 4": TypeError("no such\nargument")}
    lines = sweep_lines(monkeypatch, medians)
    assert "gather_tokens, tiny, R=1, gather_tokens.BLOCK_K = 4: failed: TypeError: no such argument" in lines
    best = "gather_tokens, tiny, R=1: best gather_tokens.BLOCK_K = 8, 7.00 us; as it is 9.00 us"
    assert lines[-1] == best and lines[0] == "received_attention, tiny, R=1, as it is: graph 9.00 us"


def test_a_sweep_repeats_only_cases_that_score(monkeypatch):
    lines = sweep_lines(monkeypatch, {}, rows=(1, 64))
    assert {line.split(",")[0] for line in lines if "R=64" in line} == {"received_attention"}
    first = next(i for i, line in enumerate(lines) if "R=64" in line)
    assert all("R=1" in line for line in lines[:first]) and all("R=64" in line for line in lines[first:])


def test_a_sweep_ends_in_time_and_goes_on_where_it_was(monkeypatch, tmp_path):
    assert all(line.endswith("as it is: no time left") for line in sweep_lines(monkeypatch, {}, end=0.0))
    journal = tmp_path / "journal"
    first = sweep_lines(monkeypatch, {}, journal=journal)
    lines = journal.read_text().splitlines()
    assert len(lines) == len(first) - 2 * 2  # but for what it is compared with, and the best
    journal.write_text("\n".join(lines[:-1]) + "\n")
    again = sweep_lines(monkeypatch, {}, journal=journal)
    assert [line.split(": ")[0] for line in again[:2]] == ["gather_tokens, tiny, R=1, as it is", lines[-1]]


def test_microbench_prints_and_writes(tmp_path, monkeypatch, capsys):
    path, options = tmp_path / "rows.csv", ["--shapes", "tiny", "--seconds", "0.001", "--no-plots"]
    monkeypatch.setattr("sys.argv", ["microbench", *options, "--cases", "select_topk", "--csv", str(path)])
    monkeypatch.setattr(microbench, "measure_ceilings", lambda *_: make_ceilings())
    assert microbench.main() == 0
    out = capsys.readouterr().out
    assert "select_topk" in out and f"4 rows in 0 s, appended to {path}" in out
    assert path.read_text().count("\n") == 5
    if not torch.cuda.is_available():
        assert "say nothing about the kernels" in out
