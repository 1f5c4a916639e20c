"""A checkpoint of mean weights: their values, what it is that loads, and what is refused."""

import sys

import average
import pytest
import torch
from training.model import make_model, make_processor
from transformers import AutoProcessor, LlavaForConditionalGeneration


def saved(folder, seed, layers=(1, 1)):
    torch.manual_seed(seed)
    make_model(112, "eager", layers=layers).bfloat16().save_pretrained(folder)
    make_processor(112).save_pretrained(folder)
    return str(folder)


def run(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["average.py", *args])
    average.main()


def test_weights_are_the_mean_of_all(tmp_path, monkeypatch):
    folders = [saved(tmp_path / name, seed) for seed, name in enumerate("abc")]
    run(monkeypatch, "--checkpoints", *folders, "--out", str(tmp_path / "mean"))
    a, b, c, mean = (
        LlavaForConditionalGeneration.from_pretrained(tmp_path / name).state_dict()
        for name in ("a", "b", "c", "mean")
    )
    for name, weight in mean.items():
        wanted = ((a[name].double() + b[name].double() + c[name].double()) / 3).bfloat16()
        torch.testing.assert_close(weight, wanted, rtol=2**-7, atol=0)
    assert not torch.equal(a["lm_head.weight"], mean["lm_head.weight"])
    processor = AutoProcessor.from_pretrained(tmp_path / "mean")
    assert processor.chat_template == AutoProcessor.from_pretrained(tmp_path / "a").chat_template


def test_what_is_refused(tmp_path, monkeypatch, capsys):
    one, other = saved(tmp_path / "a", 0), saved(tmp_path / "b", 0, (1, 2))
    for typed, said in (
        (("--checkpoints", one, "--out", "c"), "--checkpoints: expected two or more, got "),
        (("--checkpoints", one, one, "--out", one), "--out: expected a new folder, got "),
        (
            ("--checkpoints", one, other, "--out", str(tmp_path / "c")),
            "--checkpoints: expected models of one",
        ),
    ):
        with pytest.raises(SystemExit):
            run(monkeypatch, *typed)
        assert said in capsys.readouterr().err
    assert not (tmp_path / "c").exists()
