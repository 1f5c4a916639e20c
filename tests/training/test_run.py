"""Whole runs on the small trained model: what is left behind, kills, and what cannot begin."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from helpers.command_line import CHECKPOINT
from helpers.describers import make_describer, write_data
from vlmprune import ops
from vlmprune.checkpoints import Checkpoint
from vlmprune.compensation import load_compensator
from vlmprune.errors import InputError
from vlmprune.training import Plan, Start, train
from vlmprune.training.folder import Folder

PLAN = Plan(
    "uniform:layer=0",
    keep=9,
    candidates=2,
    batch_size=2,
    steps=5,
    captioner_rate=1e-2,
    selector_rate=1e-2,
    warm_up=1,
    sample=True,
)


@pytest.fixture(autouse=True)
def reference():
    with ops.use_backend("reference"):
        yield


@pytest.fixture(scope="module")
def checkpoint():
    return Checkpoint(str(CHECKPOINT), device="cpu", dtype="float32")


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path / "data")


@pytest.fixture
def start(tmp_path):
    make_describer().save_pretrained(tmp_path / "init")
    return Start(str(tmp_path / "init"))


@pytest.fixture
def run(checkpoint, data, start, tmp_path):
    def call(out="out", plan=PLAN, **settings):
        return train(checkpoint, data, tmp_path / out, plan, settings.pop("start", start), **settings)

    return call


class Killed(Exception):
    pass


def killer(at):
    def tell(doing, done, total):
        if done == at:
            raise Killed

    return tell


def weights(out):
    return {
        f"{part}.{name}": value
        for part in ("captioner", "selector")
        for name, value in load_file(out / "compensator" / part / "model.safetensors").items()
    }


def lines(out):
    return [json.loads(line) | {"seconds": 0} for line in (out / "log.jsonl").read_text().splitlines()]


def assert_same(one, other):
    assert lines(one) == lines(other)
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_leaves_a_describer_a_log_and_its_settings(run, tmp_path):
    told = []
    found = run(progress=lambda *step: told.append(step), save_steps=2)
    out = tmp_path / "out"
    assert found.steps == 5 and found.compensator == out / "compensator"
    assert [step[1:] for step in told] == [(0, 0), *((n, 5) for n in range(6))]
    log = lines(out)
    assert [line["step"] for line in log] == [1, 2, 3, 4, 5] and {line["seed"] for line in log} == {0}
    for line in log:
        assert line["kl_best"] <= line["kl_chosen"] and line["kl_best"] <= line["kl_random"]
        assert line["margin"] >= 0 and 0 <= line["picked"] <= 1 and line["kl_none"] > 0
    assert found.figures["kl_best"] == pytest.approx(sum(line["kl_best"] for line in log) / 5, abs=1e-5)
    settings = json.loads((out / "settings.json").read_text())
    assert settings["selection"] == "uniform:layer=0" and settings["samples"] == 7
    before = make_describer().state_dict()
    after = load_compensator(found.compensator).state_dict()
    assert any(not torch.equal(value, before[name]) for name, value in after.items())
    assert len(list((out / "saved").iterdir())) == 2
    assert (out / "compensator").resolve() == (out / "saved" / "step-000005" / "compensator").resolve()


@pytest.mark.parametrize("settings", [{"train_mapper": True, "sample": False}, {"dpo": 0.5}])
def test_a_run_that_was_killed_ends_as_one_that_was_not(run, tmp_path, settings):
    plan = replace(PLAN, **settings)
    run("whole", plan)
    for at in (1, 4):  # before the first save but that of the start, and after the second
        with pytest.raises(Killed):
            run("out", plan, save_steps=2, resume=at > 1, progress=killer(at))
    with (tmp_path / "out" / "log.jsonl").open("a") as log:
        log.write('{"step": 5, "kl')
    assert load_compensator(tmp_path / "out" / "compensator")
    told = []
    found = run("out", plan, resume=True, progress=lambda *step: told.append(step[1]))
    assert told == [0, 2, 3, 4, 5]
    assert_same(tmp_path / "whole", tmp_path / "out")
    again = run("out", plan, resume=True)  # nothing is left to do
    assert again.figures == pytest.approx(found.figures, abs=1e-5) and again.seconds == found.seconds


@pytest.mark.slow
def test_a_process_that_was_killed_ends_as_one_that_was_not(run, data, start, tmp_path):
    out = tmp_path / "out"
    plan = replace(PLAN, steps=7)
    asked = "--keep 9 --candidates 2 --batch-size 2 --steps 7 --captioner-rate 1e-2 --selector-rate 1e-2 --warm-up 1"
    asked += " --sample --device cpu --dtype float32 --save-steps 1"
    command = [sys.executable, "-P", "-m", "vlmprune.cli", "accm", "train", "--selection", plan.selection]
    command += ["--model", CHECKPOINT, "--data", data, "--out", out, "--init", start.init, *asked.split()]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    process = subprocess.Popen(list(map(str, command)), env=environment, stderr=subprocess.PIPE)
    log, limit = out / "log.jsonl", time.monotonic() + 120
    while not (log.exists() and log.read_bytes().count(b"\n") >= 3):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < limit
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert len(lines(out)) < 7
    assert load_compensator(out / "compensator")
    run("out", plan, resume=True)
    run("whole", plan)
    assert_same(tmp_path / "whole", out)


def test_a_save_that_is_cut_short_changes_nothing(run, tmp_path, monkeypatch):
    run("out", replace(PLAN, steps=1))
    out, before = tmp_path / "out", weights(tmp_path / "out")
    folder, other = Folder(out, resume=True), make_describer()
    for where in ("torch.save", "pathlib.Path.rename", "pathlib.Path.symlink_to"):
        with monkeypatch.context() as patched:
            patched.setattr(where, lambda *args, **kwargs: (_ for _ in ()).throw(Killed))
            if where == "pathlib.Path.rename":
                patched.setattr("vlmprune.compensation.describer.replacing", _plain)
            with pytest.raises(Killed):
                folder.save(other, {"step": 6})
        assert all(torch.equal(value, before[name]) for name, value in weights(out).items())
        assert folder.load("cpu")[1]["step"] == 1
    folder.save(other, {"step": 6})
    assert folder.load("cpu")[1]["step"] == 6 and not (out / "saved" / "part").exists()


class _plain:
    def __init__(self, folder):
        self.folder = folder

    def __enter__(self):
        self.folder.mkdir(parents=True)
        return self.folder

    def __exit__(self, *error):
        pass


def test_a_describer_of_other_precision_is_trained_in_full_precision(run, tmp_path):
    describer = make_describer()
    describer.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    plan, start = replace(PLAN, steps=2), Start(str(tmp_path / "half"))
    run("whole", plan, start=start)
    with pytest.raises(Killed):
        run("out", plan, start=start, progress=killer(1), save_steps=1)
    run("out", plan, start=start, resume=True)
    assert_same(tmp_path / "whole", tmp_path / "out")
    assert {value.dtype for value in weights(tmp_path / "out").values()} == {torch.float32}


def test_new_parts_around_pretrained_ones(run, tmp_path):
    describer = make_describer()
    for name, inner, tokenizer in (
        ("lm", describer.captioner.language_model, describer.captioner.tokenizer),
        ("encoder", describer.selector.text_encoder, describer.selector.tokenizer),
    ):
        inner.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    start = Start(captioner_lm=str(tmp_path / "lm"), text_encoder=str(tmp_path / "encoder"))
    with pytest.raises(
        InputError, match=r"^train_mapper: expected True with a new captioner, whose mapper is random"
    ):
        run("out", start=start)
    with pytest.raises(InputError, match=r"^language_model: expected a context of more than 87 tokens"):
        run("out", replace(PLAN, train_mapper=True), start=start)
    start = Start(captioner_lm=str(tmp_path / "none"))
    with pytest.raises(InputError, match=r"^captioner_lm: expected a causal language model, got '.*none': "):
        run("out", replace(PLAN, train_mapper=True), start=start)
    assert not (tmp_path / "out").exists()


def test_folders_that_hold_something_else(run, tmp_path):
    with pytest.raises(InputError, match=r"^resume: expected a run in out, got none in"):
        run("out", resume=True)
    run("out", replace(PLAN, steps=1))
    with pytest.raises(
        InputError, match=r"^out: expected a new folder, or resume, got '.*out', which holds a run$"
    ):
        run("out")
    with pytest.raises(InputError, match=r"^out: expected a run with steps = 5 to resume, got one with 1$"):
        run("out", resume=True)
    with pytest.raises(InputError, match=r"^out: expected an empty folder, or a new name, got '.*data'"):
        run("data")
    with pytest.raises(InputError, match=r"^out: expected a folder inside an existing one, got"):
        run("none/out")


def test_starts_that_cannot_be(run, tmp_path):
    with pytest.raises(
        InputError, match=r"^init: expected a describer's folder as init, or else a captioner_lm, got neither"
    ):
        Start()
    with pytest.raises(InputError, match=r"^init: expected .*, got both"):
        Start("a", "b")
    with pytest.raises(InputError, match=r"^text_encoder: expected none beside init"):
        Start("a", None, "b")
    make_describer(128).save_pretrained(tmp_path / "narrow")
    with pytest.raises(
        InputError, match=r"^init: expected a captioner for features of width 256, .* got 128$"
    ):
        run(start=Start(str(tmp_path / "narrow")))
    with pytest.raises(InputError, match=r"a folder of a compensator, got .*none, which does not exist"):
        run(start=Start(str(tmp_path / "none")))
    assert not (tmp_path / "out").exists()
