"""The published sizes: as many weights and visual tokens as they say, counted without storing any."""

import pytest
import torch
from transformers import AutoModelForImageTextToText

from vlmprune.bench import SHAPES, FullSize
from vlmprune.cli.main import SHAPE_NAMES
from vlmprune.errors import InputError

BILLIONS = {
    "llava-1.5-7b": 7.06,
    "llava-1.5-13b": 13.35,
    "llava-next-7b": 7.06,
    "qwen2.5-vl-7b-4k": 8.29,
    "qwen2.5-vl-7b-16k": 8.29,
    "qwen3-vl-4b": 4.44,
}
VISUAL = {"llava-1.5-7b": 576, "llava-next-7b": 2880, "qwen2.5-vl-7b-4k": 4096, "qwen3-vl-4b": 1024}
VISUAL |= {"cpu": 576, "tiny": 16}


@pytest.mark.parametrize("name", BILLIONS)
def test_weights(name):
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(FullSize(name, device="cpu").config)
    assert sum(x.numel() for x in model.parameters()) / 1e9 == pytest.approx(BILLIONS[name], abs=0.01)


@pytest.mark.parametrize("name", VISUAL)
def test_visual_tokens(name):
    config, prompt = FullSize(name, device="cpu").config, SHAPES[name].prompt
    ids = prompt.inputs(config, 2, torch.device("cpu"), torch.float32)["input_ids"]
    assert (ids == config.image_token_id).sum(1).tolist() == [VISUAL[name]] * 2
    assert SHAPES["qwen2.5-vl-7b-16k"].prompt.grid == (128, 128)  # whose pixels take a while


@pytest.mark.parametrize("name", SHAPES)
def test_policies_fit(name):
    from vlmprune import policy_from

    subject = FullSize(name, device="cpu")
    subject.check_depth(map(policy_from, subject.shape.policies))
    assert subject.shape.policies


def test_the_command_line_names_them():
    assert SHAPE_NAMES.split(", ") == [*SHAPES]


def test_what_it_is():
    subject = FullSize("tiny", device="cpu", attention="eager")
    assert subject.dtype == "float32" and subject.model.config._attn_implementation == "eager"
    assert FullSize("tiny", device="cpu", dtype="bfloat16").dtype == "bfloat16"
    with pytest.raises(InputError, match="expected one with a processor, got the shape 'tiny'"):
        _ = subject.processor
    with pytest.raises(InputError, match=r"shape: expected one of llava-1.5-7b, .*, got 'gpt'"):
        FullSize("gpt")
