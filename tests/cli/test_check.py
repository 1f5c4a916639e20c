"""``vlmprune check``: what it compared, in a table and as JSON, and exit code 1 where runs differ."""

import json

import pytest

from vlmprune.models import layout


def test_the_example_passes(cli, checkpoint):
    done = cli("check", checkpoint, "--dtype", "float32", "--json")
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["ok"] and report["attention"] == "sdpa" and report["dtype"] == "float32"
    assert {row["batch"] for row in report["rows"]} == {"one prompt", "padded batch"}
    assert all(row["verdict"] == "ok" for row in report["rows"])
    assert {"torch", "transformers", "vlmprune"} <= report["versions"].keys()


def test_a_policy_of_ones_own_as_a_table(cli, checkpoint):
    done = cli(
        "check", checkpoint, "--policy", "fastv:layer=2,keep=0.3", "--attn", "vlmprune", "--dtype", "float32"
    )
    assert done.exit_code == 0, done.stderr
    assert "FastV at" in done.stdout and "tokens" in done.stdout
    assert "vlmprune attention, float32 on cpu" in done.stdout
    assert "ok: pruned runs give what the masked model gives" in done.stdout


def test_a_difference_is_exit_code_1(cli, checkpoint, monkeypatch):
    real = layout._surviving

    def wrong(before, kept):
        return real(before, kept.roll(1, 0).flip(1) - 1)

    monkeypatch.setattr(layout, "_surviving", wrong)
    done = cli("check", checkpoint, "--policy", "fastv:layer=2,keep=0.3", "--dtype", "float32", "--json")
    assert done.exit_code == 1
    assert not json.loads(done.stdout)["ok"]


@pytest.mark.parametrize(
    "args, message",
    [
        (("nowhere/at/all",), "error: --model: expected a checkpoint folder"),
        (("CHECKPOINT", "--policy", "fastv:layer=99"), "error: layer: expected at most"),
        (("CHECKPOINT", "--policy", "nosuch"), "error: policy: expected one of"),
    ],
)
def test_bad_input_is_one_line(cli, checkpoint, args, message):
    done = cli("check", *(str(checkpoint) if arg == "CHECKPOINT" else arg for arg in args))
    assert done.exit_code == 2 and done.stderr.startswith(message) and done.stderr.count("\n") == 1


def test_info_lists_what_was_tested(cli):
    found = json.loads(cli("info", "--json").stdout)
    assert "5.24" in found["tested"]["transformers"]
    assert "tested with" in cli("info").stdout
