"""``vlmprune list`` at 80 columns and wider, and the schedule of one method layer by layer, for models of any depth."""

import json
import re

import pytest

from helpers.command_line import cli
from vlmprune.cli.schedule import MODEL, inputs, mean, ranges, schedule
from vlmprune.policies import AIM, LVLMCSP, FastV, FiCoCo, Scout, SparseVLM, Stages
from vlmprune.policies.registry import BUILT_IN

NARROW = [*BUILT_IN, "divprune:keep=0.5 + random_deep:layer=40,keep=0.25"]


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")


def listed(*args):
    done = cli("list", "--json", *args)
    assert done.exit_code == 0, done.stderr
    (found,) = json.loads(done.stdout).values()
    return found


def chart(*args):
    """The lines under the schedule's title, from the first layer on."""
    done = cli("list", *args)
    assert done.exit_code == 0, done.stderr
    lines = done.stdout.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("visual tokens, of"))
    return lines[first : lines.index("", first)]


def words(text):
    return " ".join(text.split())


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_the_list_is_whole_at_any_width(monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    shown = cli("list").stdout
    assert all(len(line) <= width for line in shown.splitlines()) and "…" not in shown
    firsts = [line.split()[0] for line in shown.splitlines() if line.strip()]
    assert set(BUILT_IN) <= set(firsts)
    if width == 80:
        rows = words(shown)
        assert all(policy.summary in rows for policy in BUILT_IN.values())
        assert "before the LM and layer 16; reads decoder attention, vision attention" in rows
        assert "grows as n^3" in rows and "vlmprune list NAME" in rows


@pytest.mark.parametrize("name", NARROW)
def test_a_method_is_whole_at_80_columns(monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "80")
    shown = cli("list", name).stdout
    assert all(len(line) <= 80 for line in shown.splitlines())
    known = BUILT_IN.get(name, Stages)
    assert shown.count("…") == known.formula.count("…")  # no more of them: nothing is cut off
    for preset in known.presets.values():
        assert any(line.endswith(f"  {name}:{preset}") for line in shown.splitlines())


def test_formulas_are_shown():
    assert "\nformula\n" in cli("list", "fastv").stdout
    assert listed("fastv")["formula"] == FastV.formula != ""


def test_ranges_of_layers():
    assert ranges([576, 576, 166]) == [(0, 1, 576), (2, 2, 166)]
    assert ranges([5, None, None, 5]) == [(0, 0, 5), (1, 2, None), (3, 3, 5)]
    assert ranges([]) == []


def test_what_enters_each_layer():
    title, before, behind, total = chart("fastv:layer=2,keep=166")
    assert title == "visual tokens, of 576, that enter each layer of LLaVA-1.5-7B (32 layers)"
    assert before.split() == ["0", "to", "1", "576", "█" * 24, "100.0%"]
    assert behind.split() == ["2", "to", "31", "166", "█" * 7, "28.8%"]
    assert total == "mean over the inputs of 32 layers: 191.6 tokens, 33.3%"


def test_another_depth_and_number_of_tokens():
    title, _, behind, total = chart("fastv:layer=2,keep=0.25", "--depth", 10, "--tokens", 1000)
    assert title == "visual tokens, of 1000, that enter each layer of a model (10 layers)"
    assert behind.split()[:4] == ["2", "to", "9", "250"]
    assert total == "mean over the inputs of 10 layers: 400.0 tokens, 40.0%"
    found = listed("fastv:layer=2,keep=0.25", "--depth", 10, "--tokens", 1000)
    assert found["model"] == {"name": "a model", "layers": 10, "visual_tokens": 1000}
    assert found["inputs"] == [1000, 1000] + 8 * [250] and found["mean_tokens"] == 400
    assert listed("fastv", "--depth", 40)["model"]["visual_tokens"] == 576
    assert listed("fastv", "--tokens", 100)["model"]["layers"] == 32


def test_a_checkpoint_s_own_depth(checkpoint):
    """Read from the configuration: the shipped one has 8 layers and 196 tokens."""
    title, *_ = chart("feather:layers=2/5", "--model", checkpoint)
    assert title == f"visual tokens, of 196, that enter each layer of {checkpoint} (8 layers)"
    found = listed("feather:layers=2/5", "--model", checkpoint)
    assert found["model"] == {"name": str(checkpoint), "layers": 8, "visual_tokens": 196}
    first, second = (stage["tokens"] for stage in found["schedule"])
    assert found["inputs"] == 2 * [196] + 3 * [first] + 3 * [second] and 196 > first > second
    assert listed("fastv", "--model", checkpoint, "--tokens", 50)["inputs"] == [50, 50] + 6 * [25]


def test_where_the_picture_decides_the_tokens_are_asked_for(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl"}))
    done = cli("list", "fastv", "--model", tmp_path)
    assert done.exit_code == 2 and done.stdout == ""
    assert done.stderr == (
        "error: --tokens: expected a number (how many qwen2_5_vl makes depends on the picture), got none\n"
    )
    found = listed("fastv", "--model", tmp_path, "--tokens", 1024)
    assert found["inputs"][-1] == 512 and found["model"]["visual_tokens"] == 1024


def test_a_stage_beyond_the_last_layer_is_named(checkpoint):
    *_, last = chart("scout", "--model", checkpoint)
    assert last == "beyond the last layer, 7: layer 20; such a model refuses this policy"
    *_, last = chart("ficoco", "--depth", 10)
    assert last == "beyond the last layer, 9: layer 10 to 31; such a model refuses this policy"
    found = listed("vtw", "--depth", 12)
    assert (found["beyond"], found["mean_tokens"], found["inputs"]) == ([15], None, 12 * [576])
    assert listed("vtw", "--depth", 16)["beyond"] == []


def test_what_is_known_when_chosen():
    _, before, behind = chart("sparsevlm:version=1.0,tokens=64")
    assert before.split()[:4] == ["0", "to", "2", "576"]
    assert behind == "3 to 31  known when chosen"
    unknown = Stages([LVLMCSP(), SparseVLM(layers=(3,), version="1.0", tokens=64)])
    entering = inputs(unknown, schedule(unknown))
    assert entering == 3 * [144] + 5 * [None] + 4 * [576] + 20 * [144]
    assert mean(schedule(unknown), entering) is None


def test_both_waves_are_counted():
    """Scout's fine tokens run the first layers too, later."""
    policy = Scout()
    stages = schedule(policy)
    assert inputs(policy, stages) == MODEL.layers * [stages[-1]["tokens"]]
    assert stages[0]["tokens"] < stages[1]["tokens"]
    assert stages[1]["reads"].startswith("tokens that were set aside (which then run the layers before)")


@pytest.mark.parametrize(
    "policy", [FastV(), LVLMCSP(), FiCoCo(), AIM()], ids=lambda policy: type(policy).__name__
)
def test_a_layer_gets_what_the_last_stage_before_it_left(policy):
    left = {stage["layer"]: stage["tokens"] for stage in schedule(policy)}
    entering = inputs(policy, schedule(policy))
    for layer in range(MODEL.layers):
        earlier = [at for at in left if at <= layer]
        assert entering[layer] == (left[max(earlier)] if earlier else MODEL.visual)


def test_stages_that_read_the_same_are_one_row():
    rows = [line for line in cli("list", "pyramiddrop").stdout.splitlines() if "one pass" in line]
    assert len(rows) == 1 and rows[0].split("│")[1].strip() == "8, 16, 24"
    rows = [
        line
        for line in cli("list", "vscan").stdout.splitlines()
        if "one pass" in line or "chooses by itself" in line
    ]
    assert [row.split("│")[1].strip() for row in rows] == ["0 (before the LM)", "16"]


@pytest.mark.parametrize(
    "args, said",
    [
        (("--depth", 8), "name: expected that of a policy, to show its schedule, got none, with --depth"),
        (
            ("--tokens", 8, "--model", "x"),
            "name: expected that of a policy, .*, got none, with --model, --tokens",
        ),
        (("fastv", "--depth", 8, "--model", "x"), "--depth: expected either --model or --depth, got both"),
        (("fastv", "--model", "no/such/folder"), "--model: expected a checkpoint folder"),
        (
            ("fether", "--depth", 8),
            "policy: expected one of .*, got 'fether' \\(did you mean 'feather'\\?\\)",
        ),
    ],
)
def test_what_cannot_be_shown_is_one_line(args, said):
    done = cli("list", *args)
    assert done.exit_code == 2 and done.stdout == ""
    assert re.match(f"error: {said}", done.stderr) and done.stderr.count("\n") == 1
