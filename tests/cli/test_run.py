"""``vlmprune run``: answers, numbers, table and JSON."""

import json

import numpy as np
import pytest
import yaml
from PIL import Image

from helpers.command_line import ask
from vlmprune import policy_from
from vlmprune.cli.show import SETTINGS
from vlmprune.models import Report
from vlmprune.models.clock import Seconds
from vlmprune.view.outcome import Outcome, median

FASTV = "fastv:layer=2,keep=0.25"
FEATHER = "feather:layers=2/5,keep=0.3"


@pytest.fixture
def result():
    """The JSON of one run with both policies and the unpruned column."""
    done = ask("--policy", FASTV, "--policy", FEATHER, "--compare", "--json", "--repeat", 2)
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


def test_json_describes_the_run(result, checkpoint, scene):
    assert result["model"] == str(checkpoint)
    assert result["images"] == [str(scene)]
    assert (result["device"], result["dtype"], result["attention"]) == ("cpu", "float32", "sdpa")
    assert (result["warm_up_runs"], result["timed_runs"]) == (1, 2)
    assert result["picture"] is None
    assert [run["policy"] for run in result["runs"]] == [None, FASTV, FEATHER]


def test_json_counts_add_up(result):
    unpruned, fastv, feather = result["runs"]
    assert unpruned["answer"] == "9 11 12 14"
    assert unpruned["kept"] == []
    assert unpruned["report"]["flops"]["cut"] == 0.0
    assert unpruned["report"]["tokens"]["mean_per_layer"] == 196

    assert fastv["report"]["stages"] == [{"layer": 2, "tokens_in": 196, "tokens_kept": 49}]
    assert fastv["report"]["tokens"] == {
        "mean_per_layer": pytest.approx((2 * 196 + 6 * 49) / 8),
        "after_last_stage": 49,
        "resident_kv": pytest.approx((2 * 196 + 6 * 49) / 8),
    }
    for run in (fastv, feather):
        flops = run["report"]["flops"]
        assert flops["pruned"] < flops["full"] == unpruned["report"]["flops"]["full"]
        assert flops["cut"] == pytest.approx(1 - flops["pruned"] / flops["full"])
        seconds = run["report"]["seconds"]
        assert 0 < seconds["selection"] < seconds["prefill"]
        assert seconds["vision"] > 0 and seconds["decode"] > 0
        assert run["report"]["decode_steps"] > 0
        stages = run["report"]["stages"]
        assert [len(kept) for kept in run["kept"]] == [stage["tokens_kept"] for stage in stages]
        assert all(kept == sorted(set(kept)) and 0 <= kept[0] <= kept[-1] < 196 for kept in run["kept"])
    assert set(feather["kept"][1]) < set(feather["kept"][0])


def test_times_are_medians():
    runs = [
        Outcome("fastv", "yes", (), Report(1.0, (), None, None, Seconds(v, p, 0.0, 1.0), 3))
        for v, p in ((5.0, 1.0), (1.0, 2.0), (3.0, 9.0))
    ]
    assert median(runs).report.seconds == Seconds(vision=3.0, prefill=2.0, selection=0.0, decode=1.0)
    assert median(runs).answer == "yes"


def test_table_has_a_column_for_each_run():
    done = ask("--policy", FASTV, "--compare")
    assert done.exit_code == 0, done.stderr
    header = next(line for line in done.stdout.splitlines() if "unpruned" in line)
    assert header.index("unpruned") < header.index("fastv")
    rows = {
        line.replace("┃", "│").split("│")[1].strip(): line for line in done.stdout.splitlines() if "│" in line
    }
    assert rows["answer"].count("9 11 12 14") >= 1
    assert "layer 2: 196→49" in rows["stages"]
    for row in ("mean over layers", "after last stage", "resident in KV", "FLOPs cut", "vision", "prefill"):
        assert row in rows
    assert "cpu, float32, sdpa" in " ".join(done.stdout.split())
    assert done.stderr == ""  # not a terminal: no progress display


def test_keeping_everything_answers_the_same():
    done = ask("--policy", "uniform:layer=2,keep=1.0", "--compare", "--json")
    unpruned, whole = json.loads(done.stdout)["runs"]
    assert whole["answer"] == unpruned["answer"]
    assert whole["report"]["flops"]["cut"] == 0.0


def test_policies_made_of_policies(tmp_path):
    """RandomDeep's own recipe, as a text and as a file; the table names what is joined and lists the settings of each."""
    recipe = "divprune:keep=0.5 + random_deep:layer=5,keep=0.25"
    data = policy_from(recipe).to_dict()
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(data))
    union = "fastv:layer=2,keep=0.2 | uniform:layer=2,stride=3"
    policies = ("--policy", recipe, "--policy", file, "--policy", union, "--repeat", 1)
    done = ask(*policies, "--json")
    assert done.exit_code == 0, done.stderr
    typed, read, joined = json.loads(done.stdout)["runs"]
    assert (typed["policy"], read["policy"]) == (recipe, str(file))
    assert typed["settings"] == read["settings"] == data
    assert typed["report"]["stages"] == [
        {"layer": 0, "tokens_in": 196, "tokens_kept": 98},
        {"layer": 5, "tokens_in": 98, "tokens_kept": 24},
    ]
    assert (typed["kept"], typed["answer"]) == (read["kept"], read["answer"])
    (kept,) = joined["kept"]
    assert 39 < len(kept) <= 39 + 25 and policy_from(joined["settings"]) == policy_from(union)


def test_headings_of_policies_made_of_policies():
    heading = lambda label: (SETTINGS.sub("", label), SETTINGS.findall(label))  # noqa: E731
    assert heading("fastv:layer=2,keep=0.25") == ("fastv", ["layer=2,keep=0.25"])
    assert heading("divprune + random_deep:keep=0.25") == ("divprune + random_deep", ["keep=0.25"])
    assert heading("(fastv:keep=1 | random) & custom:layer=2,select=a.b:c") == (
        "(fastv | random) & custom",
        ["keep=1", "layer=2,select=a.b:c"],
    )
    assert heading("recipe.yaml") == ("recipe.yaml", [])


def test_without_a_policy_runs_unpruned():
    (run,) = json.loads(ask("--json").stdout)["runs"]
    assert run["policy"] is None and run["answer"] == "9 11 12 14"


def test_a_prompt_with_the_placeholder_is_taken_literally():
    literal = ask("--json", prompt="<bos> USER: <image> locate the green phone . ASSISTANT:")
    assert json.loads(literal.stdout)["runs"][0]["answer"] == "9 11 12 14"


def test_answer_length_is_limited():
    (run,) = json.loads(ask("--json", "--max-new-tokens", 2).stdout)["runs"]
    assert run["answer"] == "9 11"
    assert run["report"]["decode_steps"] == 1


def test_two_images_are_both_pruned(scene):
    other = scene.with_name("scene_70002.png")
    done = ask("--image", other, "--policy", "fastv:keep=10", "--json")
    assert done.exit_code == 0, done.stderr
    (run,) = json.loads(done.stdout)["runs"]
    assert run["report"]["visual_tokens"] == 392
    assert run["report"]["tokens"]["after_last_stage"] == 20


def test_every_attention_keeps_and_answers_the_same():
    eager, sdpa, ours = (
        json.loads(ask("--policy", FASTV, "--attn", name, "--json").stdout)
        for name in ("eager", "sdpa", "vlmprune")
    )
    assert (eager["attention"], ours["attention"]) == ("eager", "vlmprune")
    for name in ("kept", "answer"):
        assert eager["runs"][0][name] == sdpa["runs"][0][name] == ours["runs"][0][name]


def test_images_as_people_have_them(scene, tmp_path):
    """A camera held sideways, and 16-bit greys: what is seen, kept and answered is as for the plain picture."""
    plain, turned, deep = (tmp_path / f"{name}.png" for name in ("plain", "turned", "deep"))
    grey = Image.open(scene).convert("L")
    grey.save(plain)
    exif = Image.Exif()
    exif[0x0112] = 8
    grey.transpose(Image.Transpose.ROTATE_270).save(turned, exif=exif)
    Image.fromarray(np.asarray(grey).astype(np.uint16) * 257).save(deep)
    first, second, third = (
        [
            (run["kept"], run["answer"])
            for run in json.loads(ask("--policy", FASTV, "--json", image=image).stdout)["runs"]
        ]
        for image in (plain, turned, deep)
    )
    assert first == second == third
