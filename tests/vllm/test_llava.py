"""LLaVA-1.5 and its relatives in vLLM's engine, against the same checkpoint in transformers: same kept tokens, same answers."""

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed (make test-vllm)")

from helpers.served import CHECKPOINT, Reference, engine, question, said, tokens
from helpers.served_tiny import LAYOUTS, ask, engine_settings, renamed, tiny
from vlmprune import policy_from

POLICIES = [
    {"policy": "divprune", "keep": 64, "positions": "pack"},
    {"policy": "fastervlm", "keep": 49, "vision_layer": -1, "positions": "pack"},
    {"policy": "visionzip", "dominant": 40, "contextual": 9, "positions": "pack"},
    {"policy": "vispruner", "keep": 50, "positions": "pack"},
    {"policy": "uniform", "layer": 0, "keep": 0.25},
    {"policy": "random", "layer": 0, "keep": 30},
    {"policy": "folder", "keep": 64, "positions": "pack"},
]
MADE = {"clip": "llama", "siglip": "qwen2"}
SMALL = {
    "divprune": {"policy": "divprune", "keep": 0.5, "positions": "pack"},
    "fastervlm": {"policy": "fastervlm", "keep": 5, "positions": "pack"},
    "visionzip": {"policy": "visionzip", "dominant": 5, "contextual": 2, "positions": "pack"},
    "folder": {"policy": "folder", "keep": 6, "positions": "pack"},
}
ASKED = [ask("square"), ask("wide", "tall", seed=1), ask(seed=3)]
"""One image, two of them, and text alone."""


@pytest.fixture(scope="module")
def reference():
    return Reference(CHECKPOINT)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy["policy"])
def test_answers_are_those_of_transformers(reference, policy):
    asked = [question(0), question(1), question(2), question(3, images=2)]
    with engine(CHECKPOINT, policy) as llm:
        outputs = said(llm, [one.prompt() for one in asked])
    made = policy_from(policy)
    assert tokens(outputs) == [reference(one, made) for one in asked]
    text = len(question(0, images=0).text.split())
    assert len(outputs[0].prompt_token_ids) == text + made.kept(196, 1, 0)


def test_unpruned_is_transformers(reference):
    asked = [question(0), question(1, images=2)]
    with engine(CHECKPOINT, {"policy": "uniform", "layer": 0, "keep": 1.0}) as llm:
        outputs = said(llm, [one.prompt() for one in asked])
    assert tokens(outputs) == [reference(one, None) for one in asked]


@pytest.fixture(scope="module", params=MADE)
def made(request, tmp_path_factory):
    """A checkpoint's folder, and the checkpoint in transformers. SigLIP's has a pooling head, which no LLaVA uses."""
    folder = tiny("llava", tmp_path_factory.mktemp(request.param), request.param, MADE[request.param])
    return folder, Reference(folder)


@pytest.mark.parametrize("name", SMALL)
def test_either_tower(made, name):
    folder, reference = made
    with engine(folder, SMALL[name], **engine_settings("llava")) as llm:
        outputs = said(llm, [one.prompt() for one in ASKED])
    policy = policy_from(SMALL[name])
    assert tokens(outputs) == [reference(one, policy) for one in ASKED]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_checkpoints_of_other_names_load(made, tmp_path, layout):
    folder, reference = made
    settings = SMALL["fastervlm"]
    with engine(renamed(folder, tmp_path / layout, layout), settings, **engine_settings("llava")) as llm:
        outputs = said(llm, [one.prompt() for one in ASKED])
    policy = policy_from(settings)
    assert tokens(outputs) == [reference(one, policy) for one in ASKED]
