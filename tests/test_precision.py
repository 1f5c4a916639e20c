"""What "auto" loads on a CPU: as stored, or float32 where the CPU is slow in that, which is then said."""

import json

import pytest
import torch

from helpers.command_line import EXAMPLE, ask, cli
from vlmprune import checkpoints, precision
from vlmprune.checkpoints import Checkpoint
from vlmprune.precision import slow_on_cpu

STORED = "bfloat16"
pytestmark = pytest.mark.cpu("the choice is one for CPUs")


@pytest.fixture
def pretend(monkeypatch):
    def choose(slow):
        monkeypatch.setattr(checkpoints, "slow_on_cpu", lambda dtype: slow and dtype != torch.float32)

    return choose


@pytest.mark.parametrize("times, slow", [((5.0, 1.0), True), ((1.4, 1.0), False), ((0.4, 1.0), False)])
def test_slow_is_what_takes_longer(monkeypatch, times, slow):
    monkeypatch.setattr(precision, "_seconds", lambda dtype: times[dtype == torch.float32])
    slow_on_cpu.cache_clear()
    try:
        assert slow_on_cpu(torch.bfloat16) is slow and slow_on_cpu(torch.float32) is False
    finally:
        slow_on_cpu.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_tried(dtype):
    assert 0 < precision._seconds(dtype) < 10


def test_a_slow_cpu_gets_float32(pretend):
    pretend(slow=True)
    checkpoint = Checkpoint(str(EXAMPLE / "checkpoint"), device="cpu")
    assert (checkpoint.dtype, checkpoint.stored) == ("float32", STORED)
    assert checkpoint.precision == "float32 (stored as bfloat16, slow on this CPU)"
    assert {x.dtype for x in checkpoint.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("slow, dtype, found", [(False, "auto", STORED), (True, STORED, STORED)])
def test_else_it_is_as_stored_or_as_asked(pretend, slow, dtype, found):
    pretend(slow)
    checkpoint = Checkpoint(str(EXAMPLE / "checkpoint"), device="cpu", dtype=dtype)
    assert (checkpoint.dtype, checkpoint.stored, checkpoint.precision) == (found, None, found)


def test_the_commands_say_so(pretend):
    pretend(slow=True)
    said = "float32 (stored as bfloat16, slow on this CPU)"
    options = ("--repeat", 1, "--max-new-tokens", 1, "--dtype", "auto")
    settings = json.loads(ask(*options, "--json").stdout)
    assert (settings["dtype"], settings["precision"]) == ("float32", said)
    assert said in " ".join(ask(*options).stdout.split())
    options = ("--policy", "fastv:layer=2", "--device", "cpu")
    assert said in cli("check", EXAMPLE / "checkpoint", *options).stdout
    report = json.loads(cli("check", EXAMPLE / "checkpoint", *options, "--json").stdout)
    assert (report["dtype"], report["precision"]) == ("float32", said)
