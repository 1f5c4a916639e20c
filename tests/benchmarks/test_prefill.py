"""The prefill of real size, tried on six small layers: a line for everything asked, and none for logits that are no numbers."""

import json

import prefill
import pytest
import torch


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr("sys.argv", ["prefill", "--repeat", "2", *arguments])
    return prefill.main(), capsys.readouterr().out


def test_a_line_for_each(monkeypatch, capsys):
    code, out = run(monkeypatch, capsys, "--tiny")
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    asked = [(a, n, p) for a in ("sdpa", "vlmprune") for n in (1, 5) for p in prefill.TINY.policies]
    assert [(line["attention"], line["images"], line["policy"]) for line in lines] == asked
    gpu = torch.cuda.is_available()
    for line in lines:
        assert line["tokens"] == 35 + 17 * line["images"] + 29
        assert 0 < line["host ms"]["p20"] <= line["host ms"]["median"] <= line["host ms"]["p80"]
        assert (line["device ms"] is not None) == (line["launches"] is not None) == gpu
        stages = {"unpruned": 0, "feather": 2}.get(line["policy"].partition(":")[0], 1)
        assert len(line["stages"]) == stages and all(path.startswith("one pass") for path in line["stages"])


def test_what_is_asked_for(monkeypatch, capsys):
    options = ["--images", "2", "--attention", "eager", "--policies", "uniform:layer=3,keep=2"]
    _, out = run(monkeypatch, capsys, "--tiny", *options)
    line = json.loads(out)
    assert (line["images"], line["attention"], line["policy"]) == (2, "eager", "uniform:layer=3,keep=2")


def test_logits_that_are_no_numbers_are_an_error(monkeypatch, capsys):
    make = prefill.make_model

    def spoiled(*args):
        model = make(*args)
        model.lm_head.weight.data[0, 0] = torch.nan
        return model

    monkeypatch.setattr(prefill, "make_model", spoiled)
    with pytest.raises(RuntimeError, match=r"^logits: expected finite numbers under unpruned, got "):
        run(monkeypatch, capsys, "--tiny")


def test_the_real_size_needs_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, out = run(monkeypatch, capsys)
    assert code == prefill.REFUSED and out.startswith("expected a CUDA device or --tiny")


def test_the_real_size_is_seven_billion():
    """Counted on meta, where nothing is stored."""
    model = prefill.make_model(prefill.REAL, torch.device("meta"), torch.bfloat16)
    assert 7.0e9 < sum(x.numel() for x in model.parameters()) < 7.1e9
    assert model.config.vision_config.image_size == 336 and len(model.model.language_model.layers) == 32


def test_a_gpu_is_idle_before_and_not_waited_for_within(monkeypatch):
    """Host time ends when the call has returned, which is before the device is done."""
    order = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            order.append("event")

        def synchronize(self):
            order.append("wait for event")

        def elapsed_time(self, last):
            return 7.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append("wait"))
    host, device = prefill.timed(lambda: order.append("call"), gpu=True)
    assert device == 7.0 and 0 < host < 1000
    assert order == ["wait", "event", "call", "event", "wait for event"]
