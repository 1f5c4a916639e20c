"""LLaVA-NeXT and LLaVA-OneVision in vLLM's engine: images cut into tiles, as many of them as the image's shape asks for."""

import numpy as np
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed (make test-vllm)")

from helpers.scorers import Slope
from helpers.served import Reference, engine, said, tokens
from helpers.served_tiny import LAYOUTS, SIZES, VIDEO, ask, engine_settings, picture, renamed, tiny
from vlmprune import policy_from

MADE = {"llava_next": ("clip", "mistral"), "llava_onevision": ("siglip", "qwen2")}
POLICIES = {
    "divprune": {"policy": "divprune", "keep": 12, "positions": "pack"},
    "divprune-crop": {"policy": "divprune", "keep": 0.25, "spend": "crop", "positions": "pack"},
    "divprune-image": {"policy": "divprune", "keep": 0.25, "spend": "image", "positions": "pack"},
    "fastervlm": {"policy": "fastervlm", "keep": 0.25, "vision_layer": -2, "positions": "pack"},
    "fastervlm-image": {
        "policy": "fastervlm",
        "keep": 11,
        "vision_layer": -3,
        "spend": "image",
        "positions": "pack",
    },
    "visionzip": {"policy": "visionzip", "dominant": 8, "contextual": 3, "positions": "pack"},
    "vispruner": {"policy": "vispruner", "keep": 13, "positions": "pack"},
    "folder-tower": {"policy": "folder", "keep": 0.25, "positions": "pack"},
    "folder-projected": {"policy": "folder", "keep": 20, "place": "projected", "positions": "pack"},
    "uniform": {"policy": "uniform", "layer": 0, "keep": 0.25},
    "random": {"policy": "random", "layer": 0, "keep": 10},
    "learned": {"policy": "learned", "layer": 0, "keep": 0.25, "spend": "crop"},
}
WHOLE = {"policy": "uniform", "layer": 0, "keep": 1.0}
"""Keeps everything: the plugin's path, and vLLM's own tokens."""

ASKED = [ask(shape, seed=i) for i, shape in enumerate(SIZES)]
ASKED += [ask("square", "strip", seed=20), ask("wide", "large", "tiny", seed=30), ask(seed=40)]
"""Every shape, several images in one request, and text alone: one batch of different tile counts."""


@pytest.fixture(scope="module", params=MADE)
def made(request, tmp_path_factory):
    """The family, its checkpoint's folder, and the checkpoint in transformers.

    transformers cuts images into tiles where it is given a list of them, and none of those in a nested list of two or more
    (OneVision). The reference hands over a list, which is also what vLLM does.
    """
    tower, decoder = MADE[request.param]
    folder = tiny(request.param, tmp_path_factory.mktemp(request.param), tower, decoder)
    return request.param, folder, Reference(folder)


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scorer") / "slope"
    Slope(8).save_pretrained(folder)
    return str(folder)


def lengths(reference, asked, policy):
    """What a prompt comes to: its text, and of each image alone as many tokens as the policy keeps."""
    text, image = asked.text.replace("<image> ", ""), reference.processor.image_token_id
    total = len(reference.processor.tokenizer(text, add_special_tokens=False).input_ids)
    for one in asked.images:
        ids = reference.processor(text="<image>", images=[one]).input_ids[0]
        total += policy.kept(ids.count(image), 1, 0)
    return total


def test_unpruned_is_transformers(made):
    family, folder, reference = made
    with engine(folder, WHOLE, **engine_settings(family)) as llm:
        outputs = said(llm, [one.prompt() for one in ASKED])
    assert tokens(outputs) == [reference(one, None) for one in ASKED]


@pytest.mark.parametrize("name", POLICIES)
def test_answers_are_those_of_transformers(made, scorer, name):
    family, folder, reference = made
    settings = POLICIES[name] | ({"scorer": scorer} if name == "learned" else {})
    with engine(folder, settings, **engine_settings(family)) as llm:
        outputs = said(llm, [one.prompt() for one in ASKED])
    policy = policy_from(settings)
    assert tokens(outputs) == [reference(one, policy) for one in ASKED]
    assert [len(o.prompt_token_ids) for o in outputs] == [lengths(reference, one, policy) for one in ASKED]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_checkpoints_of_other_names_load(made, tmp_path, layout):
    family, folder, reference = made
    settings = POLICIES["fastervlm"]
    with engine(renamed(folder, tmp_path / layout, layout), settings, **engine_settings(family)) as llm:
        outputs = said(llm, [one.prompt() for one in ASKED[:2]])
    policy = policy_from(settings)
    assert tokens(outputs) == [reference(one, policy) for one in ASKED[:2]]


def film(frames: int = 3):
    """``[frames, height, width, 3]`` uint8."""
    return np.stack([np.asarray(picture("square", 50 + i)) for i in range(frames)])


def test_a_video_stays_whole(tmp_path):
    folder = tiny("llava_onevision", tmp_path, *MADE["llava_onevision"])
    reference, frames = Reference(folder), film()
    text = f"<bos> USER: {VIDEO} what does the sign say ? ASSISTANT:"
    inputs = reference.processor(text=text, videos=frames, return_tensors="pt", add_special_tokens=False)
    want = reference.model.generate(**inputs, max_new_tokens=8, do_sample=False)
    length = inputs["input_ids"].shape[1]

    both = f"<bos> USER: <image> {VIDEO} what does the sign say ? ASSISTANT:"
    image = picture("wide")
    prompts = [
        {"prompt": text, "multi_modal_data": {"video": [frames]}},
        {"prompt": both, "multi_modal_data": {"video": [frames], "image": [image]}},
    ]
    with engine(folder, POLICIES["fastervlm-image"], **engine_settings("llava_onevision")) as llm:
        alone, mixed = said(llm, prompts)
    assert len(alone.prompt_token_ids) == length == 9 + 3 * 4 + 1  # frames of half the side, and a newline
    assert tokens([alone]) == want[:, length:].tolist()
    assert len(mixed.prompt_token_ids) == length + 11
