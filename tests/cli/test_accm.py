"""``vlmprune accm train``: what it says at its end, and one line for what cannot begin."""

import json

import pytest

from helpers.command_line import EXAMPLE, ask, cli
from helpers.describers import make_describer, write_data
from vlmprune import ops
from vlmprune.compensation import load_compensator


@pytest.fixture(autouse=True)
def reference():
    with ops.use_backend("reference"):
        yield


@pytest.fixture
def train(checkpoint, tmp_path):
    data = write_data(tmp_path / "data")
    make_describer(chooses=False).save_pretrained(tmp_path / "init")

    def call(*args, init=tmp_path / "init"):
        fixed = ["--model", checkpoint, "--data", data, "--out", tmp_path / "out", "--device", "cpu"]
        fixed += ["--selection", "uniform:layer=0", "--keep", "0.05", "--dtype", "float32", "--steps", 2]
        fixed += [] if init is None else ["--init", init]
        return cli("accm", "train", *fixed, *args)

    return call


def test_a_training_and_what_it_says(train, tmp_path):
    done = train("--dpo", "--beta", 0.3, "--batch-size", 2, "--train-mapper", "--seed", 4)
    assert done.exit_code == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith("2 steps, ") and "; best picked " in first
    assert second == f"compensator: {tmp_path / 'out' / 'compensator'}"
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    wanted = {"dpo": 0.3, "keep": 0.05, "batch_size": 2, "train_mapper": True, "seed": 4, "steps": 2}
    assert wanted.items() <= settings.items()
    assert load_compensator(tmp_path / "out" / "compensator").selector is None


def test_captions_first(train, tmp_path):
    data = tmp_path / "data" / "questions.jsonl"
    data.write_text(data.read_text().replace('"answer"', '"caption"'))
    done = train("--imitate")
    assert done.exit_code == 0, done.stderr
    assert done.stdout.startswith("2 steps, ") and " nats a token\n" in done.stdout
    assert "'answer', got None" in train("--resume").stderr


@pytest.mark.parametrize(
    "args, said",
    [
        (
            ("--data", "/none"),
            "--data: expected a JSONL file, or a folder with a questions.jsonl, got '/none'",
        ),
        (
            ("--selection", "fastv:layer=2"),
            "selection: expected a policy that acts at layer 0 alone, got FastV",
        ),
        (("--selection", "none"), "policy: expected one of "),
        (("--keep", "few"), "keep: expected a number of tokens or a share, got 'few'"),
        (("--keep", "1.5"), "keep: expected "),
        (
            ("--captioner-lm", "gpt2"),
            "--init: expected a describer's folder as init, or else a captioner_lm, got both",
        ),
        (("--epochs", "0"), "--epochs: expected a number above 0, got 0.0"),
        (("--rows", "2"), "rows: expected a whole number of 4 or more, got 2"),
        (("--resume",), "--resume: expected a run in out, got none in "),
    ],
)
def test_bad_input_leaves_nothing_behind(train, tmp_path, monkeypatch, args, said):
    monkeypatch.setattr(
        "vlmprune.checkpoints.AutoModelForImageTextToText", None
    )  # all before the weights are read
    done = train(*args)
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert said in done.stderr
    assert not (tmp_path / "out").exists()


def test_nothing_to_start_from(train):
    assert (
        "--init: expected a describer's folder as init, or else a captioner_lm, got neither"
        in train(init=None).stderr
    )


def test_the_shipped_compensator_reads_the_sign():
    """12 of 196 tokens do not show its letters; the captioner has seen the others, and the answer is what it says."""
    policy = f"accm:selection=uniform:layer=0,compensator={EXAMPLE / 'compensator'},keep=12,wording={{}}"
    done = ask(
        *("--policy", "uniform:layer=0,keep=12", "--policy", policy, "--json", "--repeat", 1),
        model=EXAMPLE / "checkpoint-reads",
        image=EXAMPLE / "images" / "scene_70002.png",
        prompt="what does the sign say ?",
    )
    assert done.exit_code == 0, done.stderr
    plain, told = json.loads(done.stdout)["runs"]
    assert plain["answer"] != "R Z C" and plain["report"]["captions"] == []
    assert told["answer"] == "R Z C" and told["report"]["captions"] == [["sign R Z C ."]]
    assert told["report"]["flops"]["captions"] > 0 and told["report"]["caption_seconds"] > 0
