"""``vlmprune tune`` on the small trained model: a search at a budget, killed and gone on with, a profile, and bad input."""

import json
import shutil
from importlib import import_module

import pytest
import yaml

from helpers.command_line import CHECKPOINT, cli
from vlmprune import ops
from vlmprune.checkpoints import Checkpoint
from vlmprune.errors import InputError, check
from vlmprune.policies import FastV, policy_from
from vlmprune.tuning import search

pytest.importorskip("matplotlib")
FAMILIES = ("box", "color")


@pytest.fixture(autouse=True)
def reference(monkeypatch):
    """Kernels have their own tests; interpreted they are slow."""
    with ops.use_backend("reference"):
        yield


@pytest.fixture
def folder(scene, tmp_path):
    """Eight questions about four scenes."""
    (tmp_path / "q").mkdir()
    lines = []
    for entry in json.loads((scene.parent / "questions.json").read_text())[:4]:
        shutil.copy(scene.parent / entry["image"], tmp_path / "q")
        for asked in entry["qa"]:
            if asked["family"] in FAMILIES:
                line = {k: asked[k] for k in ("family", "prompt", "answer")} | {"image": entry["image"]}
                lines.append(line | {"id": f"{entry['seed']}-{asked['family']}"})
    (tmp_path / "q" / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path / "q"


def tune(folder, out, *args):
    fixed = (
        "--model",
        CHECKPOINT,
        "--questions",
        folder,
        "--out",
        out,
        "--dtype",
        "float32",
        "--device",
        "cpu",
    )
    return cli("tune", *fixed, *args)


def test_a_search_finds_writes_and_goes_on(folder, tmp_path):
    out = tmp_path / "out"
    sweeps = ("--policy", "fastv:layer={2,3,7}", "--policy", "p_sigmoid:of=(fastv:layer=2),steepness={1,4}")
    sweeps += ("--policy", "g_search:of=(fastv:layer=2),levels=2,tolerance=1.0")
    args = ("--budget", "0.5", "--first", 2, "--one-in", 3, "--max-new-tokens", 8, *sweeps)
    done = tune(folder, out, *args)
    assert done.exit_code == 0, done.stderr
    assert {p.name for p in out.iterdir()} == {
        "answers.jsonl",
        "settings.json",
        "search.json",
        "search.png",
        "best.yaml",
    }
    found = json.loads((out / "search.json").read_text())
    assert found["left_out"] == {"fastv:layer=7": "cut: expected a share between 0.0000 and 0.1198, got 0.5"}
    assert "left out: fastv:layer=7: cut: expected" in done.stdout
    sizes = [(rung["questions"], len(rung["standings"])) for rung in found["rungs"]]
    assert sizes == [(2, 5), (4, 2), (6, 2)]  # two of the eight are G-Search's own
    for rung in found["rungs"]:
        assert all(one["cut"] == pytest.approx(0.5, abs=0.015) for one in rung["standings"])
    best = found["rungs"][-1]["standings"][0]
    policy = policy_from(out / "best.yaml")
    assert best["method"] == found["best"] and best["policy"] == repr(policy) and best["stays"]
    assert yaml.safe_load((out / "best.yaml").read_text()) == policy.to_dict()
    assert f"best: {found['best']}" in done.stdout

    answers = (out / "answers.jsonl").read_text().splitlines()
    (out / "answers.jsonl").write_text("\n".join(answers[:-5]) + "\n")
    (out / "best.yaml").unlink()
    again = tune(folder, out, *args)
    assert again.exit_code == 0 and again.stdout == done.stdout
    assert json.loads((out / "search.json").read_text()) == found and policy_from(out / "best.yaml") == policy
    assert len((out / "answers.jsonl").read_text().splitlines()) == len(answers)

    other = tune(folder, out, *args, "--seed", 1)
    assert other.exit_code == 2 and other.stderr.startswith(
        "error: --out: expected a new folder, or one made with seed"
    )


def test_a_profile_needs_no_answers(folder, tmp_path):
    lines = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    bare = [{k: line[k] for k in ("id", "image", "prompt")} for line in lines]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, bare)))
    done = tune(folder, tmp_path / "out", "--images", 4)
    assert done.exit_code == 0, done.stderr
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"profile.json", "profile.png"}
    layer = json.loads((tmp_path / "out" / "profile.json").read_text())["recommended"]
    assert f"first stage that can know what is asked: layer={layer}" in done.stdout
    asked = tune(folder, tmp_path / "search", "--budget", 0.5)
    assert asked.exit_code == 2
    assert asked.stderr == "error: questions.jsonl line 1: expected a text as 'family', got None\n"
    assert not (tmp_path / "search").exists()


@pytest.mark.parametrize(
    "args, said",
    [
        (("--budget", "1.2"), "error: --budget: expected a share of the FLOPs between 0 and 1, got 1.2\n"),
        (
            ("--budget", "0.5", "--policy", "fastv:layer={2"),
            "error: policy: expected braces {...} that match",
        ),
        *(
            (
                typed,
                "error: --budget: expected a share of the FLOPs, to search policies at, got none, with "
                + f"{', '.join(typed[::2])}\n",
            )
            for typed in (
                ("--policy", "fastv"),
                ("--first", "4", "--one-in", "3"),
                ("--batch-size", "16"),
                ("--max-new-tokens", "8"),
            )
        ),
        (
            ("--budget", "0.5", "--images", "4"),
            "error: --images: expected only without --budget, for a profile, got both\n",
        ),
        (
            ("--budget", "0.5", "--first", "5", "--policy", "g_search:of=(fastv:layer=2)"),
            "error: --questions: expected at least 10 with g_search, which has 5 to itself, got 8\n",
        ),
        (("--budget", "0.5", "--family", "no"), "error: --family: expected one of box, color, got 'no'\n"),
        (("--budget", "0.5", "--policy", "fastv:lair=2"), "error: policy fastv: expected one of the fields"),
    ],
)
def test_bad_input_is_said_before_the_weights_are_loaded(folder, tmp_path, monkeypatch, args, said):
    monkeypatch.setattr("vlmprune.checkpoints.AutoModelForImageTextToText", None)
    done = tune(folder, tmp_path / "out", *args)
    assert done.exit_code == 2 and done.stderr.startswith(said)
    assert not (tmp_path / "out").exists()


def test_a_picture_that_cannot_be_read_is_no_matter_of_the_budget(folder, tmp_path, monkeypatch):
    """G-Search asks before the race does."""

    def broken(subject, arms, part, number, store, progress, doing):
        check(False, "image", "a picture", doing)

    monkeypatch.setattr(import_module("vlmprune.tuning.search"), "ask", broken)
    sweeps = ("--policy", "fastv:layer=2", "--policy", "g_search:of=(fastv:layer=2)")
    done = tune(folder, tmp_path / "out", "--budget", "0.5", "--first", 2, *sweeps)
    assert done.exit_code == 2 and done.stderr == "error: image: expected a picture, got g_search\n"


class Nameless(FastV):
    """No entry point: no file can say what it is."""


@pytest.mark.parametrize(
    "policy, said",
    [
        ("fastv:layer={6,7}", "^policy: expected one that can meet a budget of 0.6, got fastv:layer=6: cut: expected"),
        (Nameless(layer=2), "^policy: expected a class with an entry point in 'vlmprune.policies', got Nameless$"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_searched_leaves_nothing_behind(folder, tmp_path, monkeypatch, policy, said):
    monkeypatch.setattr("vlmprune.checkpoints.AutoModelForImageTextToText", None)
    with pytest.raises(InputError, match=said):
        search(Checkpoint(str(CHECKPOINT)), folder, tmp_path / "out", [policy], budget=0.6, first=2)
    assert not (tmp_path / "out").exists()
