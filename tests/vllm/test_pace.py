"""A step of the engine encodes as many images as it would if nothing were pruned."""

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed (make test-vllm)")

from helpers.served import CHECKPOINT, engine

TOKENS = 196
LARGEST = pytest.mark.parametrize("more, most", [({}, 49), ({"max_keep": 98}, 98)], ids=["keep", "max_keep"])


@LARGEST
def test_a_step_encodes_as_many_images_as_unpruned(more, most):
    with engine(
        CHECKPOINT,
        {"policy": "divprune", "keep": 49, "positions": "pack", **more},
        max_num_batched_tokens=1960,
    ) as llm:
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        assert scheduler.max_num_encoder_input_tokens // most == 1960 // TOKENS == 10
        assert scheduler.max_num_scheduled_tokens == 1960


@LARGEST
def test_the_largest_budget_always_fits(more, most):
    few = {"max_num_batched_tokens": 128, "max_num_seqs": 8}
    with engine(CHECKPOINT, {"policy": "divprune", "keep": 49, "positions": "pack", **more}, **few) as llm:
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        assert scheduler.max_num_encoder_input_tokens == most > 128 * most // TOKENS
