"""``vlmprune check``: what it compared, in a table and as JSON, and exit code 1 where runs differ."""

import json
from importlib.metadata import version

import pytest

from helpers.command_line import cli
from vlmprune.cli import check
from vlmprune.models import stage
from vlmprune.testing.model_report import ModelReport, Row

POLICY = ("--policy", "fastv:layer=2,keep=0.3", "--dtype", "float32", "--device", "cpu")


def test_a_right_wiring_is_ok(checkpoint):
    done = cli("check", checkpoint, *POLICY, "--attn", "vlmprune")
    assert done.exit_code == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "vlmprune attention, float32 on cpu" in lines[0] and f"torch {version('torch')}" in "".join(lines)
    compared = [line.split("  ")[2].strip() for line in lines if line.startswith("ok  ")]
    assert compared == ["unpruned with masked", "keep all with unpruned", "FastV at 2 with masked"] * 2
    assert lines[-1] == "ok: pruned runs give what the masked model gives"
    assert all(len(line) <= 80 for line in lines)
    assert done.stderr == ""  # not a terminal: no progress display


def test_a_wrong_wiring_exits_with_1(checkpoint, monkeypatch):
    def skipped(self, prefill, i, hidden, *rest):
        prefill.decisions[i] = None
        return hidden

    monkeypatch.setattr(stage.StageRunner, "__call__", skipped)
    done = cli("check", checkpoint, *POLICY, "--json")
    assert done.exit_code == 1
    report = json.loads(done.stdout)
    assert (report["ok"], report["attention"], report["dtype"]) == (False, "sdpa", "float32")
    measured, kept, pruned = report["rows"][:3]
    assert (measured["allowed"], kept["difference"], pruned["tokens"]) == (None, 0.0, 4)
    assert pruned["fault"] == "the run recorded stages at [], not at [2]"


def test_the_table_shows_what_failed_and_what_cannot_tell(checkpoint, monkeypatch):
    rows = (
        Row("prompt", "FastV at 2 with masked", 3.0, 0.5, 2, 4, fault="not at [2]"),
        Row("batch", "FastV at 2 with masked", 0.1, 0.5, 12, 12, doubt="0.2 only"),
    )
    found = ModelReport("Some", "sdpa", "float32", "cpu", {"torch": "2"}, rows)
    monkeypatch.setattr(check, "check_model", lambda model, policy, strict: found)
    done = cli("check", checkpoint, *POLICY)
    assert done.exit_code == 1
    assert [" ".join(line.split()) for line in done.stdout.splitlines()] == [
        "Some, sdpa attention, float32 on cpu; torch 2",
        "compared difference same tokens",
        "FAILED prompt FastV at 2 with masked 3 of 0.5 2/4 not at [2]",
        "unsure batch FastV at 2 with masked 0.1 of 0.5 12/12 0.2 only",
        "FAILED: 1 of 2 comparisons",
    ]


@pytest.mark.parametrize(
    "args, message",
    [
        (("nowhere/at/all",), "error: --model: expected a checkpoint folder"),
        (("CHECKPOINT", "--policy", "fastv:layer=99"), "error: layer: expected at most"),
        (("CHECKPOINT", "--policy", "nosuch"), "error: policy: expected one of"),
        (("CHECKPOINT", "--attn", "flash_attention_2"), "error: --attn: expected sdpa, eager or vlmprune"),
    ],
)
def test_bad_input_is_one_line(checkpoint, args, message):
    done = cli("check", *(checkpoint if arg == "CHECKPOINT" else arg for arg in args))
    assert done.exit_code == 2 and done.stderr.startswith(message) and done.stderr.count("\n") == 1


def test_info_lists_what_was_tested():
    found = json.loads(cli("info", "--json").stdout)
    assert "5.24" in found["tested"]["transformers"]
    assert "tested with" in cli("info").stdout
