"""Offline engine against the same checkpoint in transformers: same kept tokens, same answers."""

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed (make test-vllm)")

from helpers.served import CHECKPOINT, Packed, Reference, engine, question, said, tokens
from vlmprune import policy_from

POLICIES = [
    {"policy": "divprune", "keep": 64},
    {"policy": "fastervlm", "keep": 49, "vision_layer": -1},
    {"policy": "visionzip", "dominant": 40, "contextual": 9},
    {"policy": "vispruner", "keep": 50},
    {"policy": "uniform", "layer": 0, "keep": 0.25},
    {"policy": "random", "layer": 0, "keep": 30},
    {"policy": "folder", "keep": 64},
]


@pytest.fixture(scope="module")
def reference():
    return Reference(CHECKPOINT)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy["policy"])
def test_answers_are_those_of_transformers(reference, policy):
    asked = [question(0), question(1), question(2)]
    with engine(CHECKPOINT, policy) as llm:
        outputs = said(llm, [one.prompt() for one in asked])
    packed = Packed(policy_from(policy))
    assert tokens(outputs) == [reference(one, packed) for one in asked]
