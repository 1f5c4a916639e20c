"""Caches that engines share, of encoded images and of what keys and values they become: another policy keeps other tokens."""

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed (make test-vllm)")

from helpers.served import CHECKPOINT, engine
from helpers.served_apart import Request, answers

DIVPRUNE = {"policy": "divprune", "keep": 49, "positions": "pack"}
READS_TOWER = {"policy": "fastervlm", "keep": 49, "vision_layer": -1, "positions": "pack"}
REQUESTS = [Request(0), Request(1, 2)]


def sharing(folder, policy):
    """An engine that puts encoded images into a folder, and takes them from there."""
    extra = {"shared_storage_path": str(folder)}
    how = {"ec_connector": "ECExampleConnector", "ec_role": "ec_both", "ec_connector_extra_config": extra}
    return engine(CHECKPOINT, policy, ec_transfer_config=how)


def encoded(llm):
    """Crops that the vision tower was given, call by call."""
    calls = []
    (model,) = llm.apply_model(lambda model: model)
    model.vision_tower.register_forward_pre_hook(lambda tower, args: calls.append(len(args[0])))
    return calls


def same(got, expected):
    assert [one.ids for one in got] == [one.ids for one in expected]
    assert logprobs(got) == pytest.approx(logprobs(expected), abs=1e-4)


def logprobs(said):
    return [one.logprob for one in said]


def test_an_encoded_image_is_shared_where_the_policy_is(tmp_path):
    with sharing(tmp_path, DIVPRUNE) as llm:
        first = answers(llm, REQUESTS)
    with sharing(tmp_path, DIVPRUNE) as llm:
        calls = encoded(llm)
        same(answers(llm, REQUESTS), first)
        assert calls == []
    with engine(CHECKPOINT, READS_TOWER) as llm:
        alone = answers(llm, REQUESTS)
    with sharing(tmp_path, READS_TOWER) as llm:
        calls = encoded(llm)
        got = answers(llm, REQUESTS)
        assert sum(calls) == 3
    same(got, alone)
    assert logprobs(got) != pytest.approx(logprobs(first), abs=1e-2)  # the policies can be told apart
