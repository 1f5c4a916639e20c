"""The launcher of examples/serving: the command it becomes. The server itself runs in tests/vllm/test_serving.py."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vlmprune.errors import InputError

ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "examples" / "glyphworld" / "checkpoint"


@pytest.fixture(scope="module")
def serve():
    spec = importlib.util.spec_from_file_location("serve", ROOT / "examples" / "serving" / "serve.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def after(words, option):
    return words[words.index(option) + 1]


def test_a_policy_becomes_the_engine_s_override(serve):
    words = serve.command(
        "visionzip:dominant=54,contextual=10,positions=pack", CHECKPOINT, 8001, ["--enforce-eager"]
    )
    over = json.loads(after(words, "--hf-overrides"))
    assert over["architectures"] == ["VLMPruneLlavaForConditionalGeneration"]
    wanted = {"policy": "visionzip", "dominant": 54, "contextual": 10, "positions": "pack"}
    assert over["vlmprune"].items() >= wanted.items()
    assert after(words, "--model") == str(CHECKPOINT) and after(words, "--port") == "8001"
    assert words[-1] == "--enforce-eager"


def test_without_a_policy_vllm_has_nothing_of_ours(serve, tmp_path, monkeypatch):
    monkeypatch.setattr(serve, "ROOT", tmp_path)
    words = serve.command("none", CHECKPOINT, 8000)
    assert "--hf-overrides" not in words and "--trust-request-mm-kwargs" not in words
    copy = Path(after(words, "--model"))
    assert copy.is_relative_to(tmp_path)
    assert {p.name for p in copy.iterdir()} == {p.name for p in CHECKPOINT.iterdir()}


def test_the_copy_has_published_names_and_the_same_weights(serve, tmp_path):
    ours, theirs = (
        load_file(folder / "model.safetensors")
        for folder in (CHECKPOINT, serve.published(CHECKPOINT, tmp_path / "copy"))
    )
    assert len(ours) == len(theirs)
    for name, weight in ours.items():
        assert torch.equal(theirs[name.replace("vision_tower.", "vision_tower.vision_model.")], weight)
    again = serve.published(tmp_path / "copy", tmp_path / "again")  # what has them already keeps them
    assert load_file(again / "model.safetensors").keys() == theirs.keys()


def test_an_unknown_policy_starts_nothing(serve):
    with pytest.raises(InputError, match=r"policy: expected one of fastv, .*, got 'fastest'"):
        serve.command("fastest:keep=3", CHECKPOINT, 8000)
