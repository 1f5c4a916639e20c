"""The pictures fit the geometry of released checkpoints: the model itself counts placeholders and features."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForImageTextToText

from helpers.families import CASES, IMAGE, START, VIDEO, build
from vlmprune.testing.pictures import make_inputs, samples_of

SIDES = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
NINE = [[384 * down, 384 * across] for down in range(1, 7) for across in range(1, 7)]
GEOMETRY = {
    "llava-llama": ({"image_size": 336, "patch_size": 14}, {}, 576),
    "llava_next": ({"image_size": 336, "patch_size": 14}, {"image_grid_pinpoints": SIDES}, 1066),
    "llava_onevision": (
        {"image_size": 384, "patch_size": 14},
        {"image_grid_pinpoints": NINE, "vision_aspect_ratio": "anyres_max_9"},
        1334,
    ),
    "internvl": ({"image_size": [448, 448], "patch_size": [14, 14]}, {}, 256),
    "idefics3": ({"image_size": 364, "patch_size": 14}, {}, 169),
    "smolvlm": ({"image_size": 512, "patch_size": 16}, {"scale_factor": 4}, 64),
    "qwen2vl": ({"patch_size": 14}, {}, 8),
    "qwen2_5_vl": ({"patch_size": 14, "window_size": 112}, {}, 8),
    "qwen3vl": ({"patch_size": 16}, {}, 8),
}
"""Sizes of the vision tower, other settings, and the visual tokens that a wide image then has."""


@pytest.mark.parametrize("name", GEOMETRY)
def test_a_released_checkpoints_geometry(name):
    vision, settings, tokens = GEOMETRY[name]
    config = CASES[name].config()
    for part, values in ((config.vision_config, vision), (config, settings)):
        for field, value in values.items():
            setattr(part, field, value)
    config.text_config.num_hidden_layers = 1
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    batches = samples_of(config)
    _, ((wide,),) = make_inputs(config, batches["prompt"])
    assert wide.tokens == tokens
    inputs, pictures = make_inputs(config, batches["batch"])
    with torch.no_grad():
        assert model(**inputs, logits_to_keep=1).logits.isfinite().all()
    ids = inputs["input_ids"]
    assert [((row == IMAGE) | (row == VIDEO)).sum().item() for row in ids] == [
        sum(picture.tokens for picture in sample) for sample in pictures
    ]


def test_words_are_no_placeholders_and_prompts_are_seeded():
    config = CASES["qwen2vl"].config()
    inputs, _ = make_inputs(config, [(500, "wide", 3)], seed=1)
    text = inputs["input_ids"][inputs["mm_token_type_ids"] == 0]
    assert (text == START).sum() == 1 and len(text) == 1 + 500 + 1 + 3
    again, other = (make_inputs(config, [(500, "wide", 3)], seed)[0] for seed in (1, 2))
    assert all(torch.equal(inputs[name], again[name]) for name in inputs)
    assert not torch.equal(inputs["input_ids"], other["input_ids"])
    assert not torch.equal(inputs["pixel_values"], other["pixel_values"])
    assert inputs["pixel_values"].abs().max() <= 1


def test_several_images_of_a_onevision_prompt_are_not_tiled():
    case = CASES["llava_onevision"]
    alone, beside = (
        make_inputs(case.config(), [sample])[1][0][0] for sample in (("wide", 1), ("wide", 1, "tall", 1))
    )
    assert alone.grids == ((4, 4), (2, 9)) and beside.grids == ((4, 4), (1, 1))
    inputs, _ = make_inputs(case.config(), case.padded)
    assert inputs["batch_num_images"].tolist() == [2, 1, 0]
    build(case)(**inputs)
