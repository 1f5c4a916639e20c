"""Qwen2.5-VL and Qwen3-VL in the engine: images are pruned as in transformers, and their tokens stand where they stood there."""

import numpy as np
import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed (make test-vllm)")

from vllm.exceptions import VLLMClientError, VLLMValidationError

from helpers.served import Asked, Reference, engine, overrides, preemptions, said, tokens
from helpers.served_qwen import END, IMAGE, MARKS, START, asked, picture, saved
from vlmprune import policy_from
from vlmprune.integrations.vllm import ARCHITECTURES

DIVPRUNE = {"policy": "divprune", "keep": 20}
WIDTHS = {"qwen2_5_vl": 128, "qwen3_vl": 384}
"""Of a row of the tower's; Qwen3-VL's inner features come along."""
POLICIES = [
    {"policy": "divprune", "keep": 10},
    {"policy": "fastervlm", "keep": 9, "vision_layer": -2},
    {"policy": "visionzip", "dominant": 8, "contextual": 4},
    {"policy": "vispruner", "keep": 8},
    {"policy": "uniform", "layer": 0, "keep": 0.25},
    {"policy": "random", "layer": 0, "keep": 7},
    {"policy": "folder", "keep": 11},
]
REQUESTS = [
    asked(3, (4, 6), 5),
    asked((9, 2), 7, seed=1),  # tall: its rows decide where text goes on
    asked(1, (3, 12), 6, seed=2),
    asked(2, (3, 9), 4, (8, 3), 6, seed=13),
    asked((2, 7), (5, 5), 1, (10, 2), 3, seed=4),
    asked(12, seed=5),
]


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def model(request, tmp_path_factory):
    return request.param, saved(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def reference(model):
    return Reference(model[1], "keep")


def serving(model, policy=DIVPRUNE, **settings):
    return engine(model[1], policy, ARCHITECTURES[model[0]][0], **settings)


def expected(reference, requests, policy=DIVPRUNE):
    return [reference(one, policy_from(policy)) for one in requests]


def test_whole_images_are_answered_as_in_transformers(model, reference):
    with engine(model[1]) as llm:
        outputs = said(llm, [one.prompt() for one in REQUESTS])
    assert tokens(outputs) == [reference(one, None) for one in REQUESTS]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy["policy"])
def test_answers_are_those_of_transformers(model, reference, policy):
    with serving(model, policy) as llm:
        outputs = said(llm, [one.prompt() for one in REQUESTS])
    assert tokens(outputs) == expected(reference, REQUESTS, policy)


def test_prompts_are_as_long_as_what_stays(model):
    with serving(model) as llm:
        few, several = said(llm, [asked(3, (3, 4), 5).prompt(), REQUESTS[3].prompt()])
    assert few.prompt_token_ids.count(IMAGE) == 12  # an image of fewer tokens keeps them all
    assert several.prompt_token_ids.count(IMAGE) == 40


def test_chunks_may_end_inside_an_image(model, reference):
    policy = {"policy": "divprune", "keep": 36}
    requests = [asked(3, (8, 9), 5, (9, 7), 4, seed=6), asked(1, (7, 9), 9, seed=7)]
    small = {"max_num_batched_tokens": 16, "max_num_seqs": 4, "enable_prefix_caching": False}
    with serving(model, policy, **small) as llm:
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        assert (
            scheduler.max_num_encoder_input_tokens == 36
        )  # room for what may stay of an image, not for all of it
        outputs = said(llm, [one.prompt() for one in requests])
    assert tokens(outputs) == expected(reference, requests, policy)


def test_prefixes_may_end_inside_an_image(model, reference):
    policy = {"policy": "divprune", "keep": 40}
    first, second = (
        Asked(one.text, (picture(8, 9),)) for one in (asked((8, 9), 5), asked((8, 9), 7, seed=1))
    )
    with serving(model, policy) as llm:
        outputs = [said(llm, [one.prompt()])[0] for one in (first, second, first)]
    assert [output.num_cached_tokens for output in outputs] == [0, 32, 32]  # of 1 + 40 up to the image's end
    assert tokens(outputs) == expected(reference, [first, second, first], policy)


def test_what_was_preempted_is_answered_the_same(model, reference):
    requests = [asked(4 + i, (6, 5 + i), 5, seed=i) for i in range(6)]
    tight = {"num_gpu_blocks_override": 8, "max_model_len": 128, "enable_prefix_caching": False}
    with serving(model, **tight, disable_log_stats=False) as llm:
        outputs = said(llm, [one.prompt() for one in requests], steps=40, ignore_eos=True)
        assert preemptions(llm) > 0
    with serving(model, max_num_seqs=1) as llm:
        alone = said(llm, [one.prompt() for one in requests], steps=40, ignore_eos=True)
    assert tokens(outputs) == tokens(alone)
    firsts = [
        one[: len(want)] for one, want in zip(tokens(alone), expected(reference, requests), strict=True)
    ]
    assert firsts == expected(reference, requests)


def test_requests_of_one_batch_have_budgets_of_their_own(model, reference):
    budgets = [5, 20, 13, 0.25]
    requests = [asked(2 + i, (6, 4 + i), 5, (4, 8), 3, seed=i) for i in range(len(budgets))]
    with serving(model) as llm:
        asks = [one.prompt(vlmprune_keep=keep) for one, keep in zip(requests, budgets, strict=True)]
        outputs = said(llm, asks)
        with pytest.raises(
            ValueError, match=r"vlmprune_keep: expected at most 20 of this image's 24 tokens .*, got 21"
        ):
            said(llm, [asked(2, (6, 4), 5).prompt(vlmprune_keep=21)])
    each = [
        expected(reference, [one], {**DIVPRUNE, "keep": keep})
        for one, keep in zip(requests, budgets, strict=True)
    ]
    assert tokens(outputs) == [answer for (answer,) in each]


def test_what_has_no_positions_of_its_own_is_refused(model, reference):
    video = f"{MARKS[START]}<|video_pad|>{MARKS[END]} w1 w2"
    frames = np.stack([np.asarray(picture(4, 4, seed=i)) for i in range(4)])
    seen = {"fps": 2.0, "duration": 2.0, "total_num_frames": 4, "frames_indices": [0, 1, 2, 3]}
    ends = Asked(f"w3 {MARKS[START]}{MARKS[IMAGE]}", (picture(4, 5),))
    with serving(model) as llm:
        with pytest.raises(VLLMValidationError, match=r"At most 0 video\(s\) may be provided in one prompt"):
            said(llm, [{"prompt": video, "multi_modal_data": {"video": (frames, seen)}}])
        with pytest.raises(VLLMClientError, match="prompt: expected text behind its last image"):
            said(llm, [ends.prompt()])
        outputs = said(llm, [one.prompt() for one in REQUESTS])
    assert tokens(outputs) == expected(reference, REQUESTS)


def test_embeddings_are_refused(model):
    """As vLLM takes them for these models: rows and their grid. In the worker there would be no pixels to look at."""
    rows = {"image_embeds": torch.zeros(20, WIDTHS[model[0]]), "image_grid_thw": torch.tensor([[1, 8, 10]])}
    whole = {"prompt": asked(2, (4, 5), 3).text, "multi_modal_data": {"image": rows}}
    with serving(model, POLICIES[1], enable_mm_embeds=True) as llm:
        with pytest.raises(VLLMClientError, match=r"^image: expected a picture .*, got embeddings$"):
            said(llm, [whole])
        assert len(tokens(said(llm, [REQUESTS[0].prompt()]))) == 1


def test_positions_beyond_those_with_angles_are_refused(model):
    over = {"text_config": {"max_position_embeddings": 512}}
    with engine(
        model[1],
        hf_overrides=overrides({"policy": "divprune", "keep": 4}, ARCHITECTURES[model[0]][0]) | over,
        limit_mm_per_prompt={"image": 256},
    ) as llm:
        said(llm, [asked(2, (6, 10), 3).prompt()])
        with pytest.raises(
            VLLMClientError, match=r"image: expected at most 10 visual tokens a side \(keep \+ 6; .*got 11"
        ):
            said(llm, [asked(2, (6, 11), 3).prompt()])


@pytest.mark.parametrize(
    ("settings", "policy", "error"),
    [
        (
            {"mm_encoder_tp_mode": "data"},
            {"policy": "fastervlm", "keep": 9},
            "mm_encoder_tp_mode: expected 'weights' where a policy reads the vision tower, got 'data'",
        ),
        (
            {"pipeline_parallel_size": 2},
            DIVPRUNE,
            r"pipeline_parallel_size: expected 1 with this model \(vLLM .*got 2",
        ),
        (
            {"worker_cls": "vllm.v1.worker.cpu_worker.CPUWorker"},
            DIVPRUNE,
            "worker_cls: expected .* on the CPU with this model",
        ),
        ({}, {**DIVPRUNE, "positions": "pack"}, "positions: expected 'keep' with this model in vLLM"),
    ],
    ids=["encoder over ranks", "pipeline", "worker", "packed"],
)
def test_what_the_engine_cannot_do_is_refused_at_its_start(model, settings, policy, error):
    with pytest.raises(ValueError, match=error), serving(model, policy, **settings):
        pass
