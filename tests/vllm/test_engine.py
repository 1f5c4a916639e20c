"""What an engine counts and caches when images are pruned, and what it takes: counts, caches, LLM.chat."""

import base64
import io

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed (make test-vllm)")

from vllm import SamplingParams

from helpers.served import CHECKPOINT, ENGINE, QUESTIONS, Reference, engine, question, said, tokens
from helpers.served_apart import Request, answers, heard
from vlmprune import policy_from

POLICY = {"policy": "fastervlm", "keep": 49, "vision_layer": -1, "max_keep": 96, "positions": "pack"}
BLOCK = ENGINE["block_size"]
GREEDY = SamplingParams(temperature=0, max_tokens=8)


@pytest.fixture(scope="module")
def llm():
    with engine(CHECKPOINT, POLICY) as llm:
        yield llm


def forget(llm):
    """Empty all caches of an engine."""
    llm.reset_prefix_cache()
    llm.reset_mm_cache()
    llm.llm_engine.engine_core.reset_encoder_cache()


@pytest.fixture
def fresh(llm):
    forget(llm)
    return llm


@pytest.fixture
def encoded(fresh):
    """How many crops the vision tower was given, call by call."""
    calls = []
    (model,) = fresh.apply_model(lambda model: model)
    hook = model.vision_tower.register_forward_pre_hook(lambda tower, args: calls.append(len(args[0])))
    yield calls
    hook.remove()


@pytest.mark.parametrize("keep, kept", [(None, 49), (96, 96), (0.1, 19), (1, 1)])
@pytest.mark.parametrize("images", [0, 1, 2])
def test_a_prompt_counts_its_kept_tokens(fresh, keep, kept, images):
    text = len(fresh.get_tokenizer().encode(question(0).text, add_special_tokens=False)) - 1
    (answer,) = answers(fresh, [Request(0, images, keep if images else None)], 1)
    assert (answer.prompt, answer.cached) == (text + images * kept, 0)


def test_a_repeated_prompt_is_read_from_the_prefix_cache(fresh, encoded):
    (first,) = answers(fresh, [Request()])
    (again,) = answers(fresh, [Request()])
    assert again.cached == (first.prompt - 1) // BLOCK * BLOCK > 0
    assert again.ids == first.ids
    assert again.logprob == pytest.approx(first.logprob, abs=1e-4)
    assert encoded == [1]


def test_another_budget_or_picture_shares_no_block_with_the_image(fresh):
    answers(fresh, [Request(0)])
    others = answers(fresh, [Request(0, keep=48), Request(0, keep=96), Request(3)])  # 3: the same question
    assert [other.cached for other in others] == [0, 0, 0]


def test_a_cached_image_is_pruned_by_the_budget_of_the_request(fresh, encoded):
    """Processor, encoder and prefix caches know a picture by its hash; the budget is part of it."""
    reference = Reference(CHECKPOINT)
    budgets = [None, 24, 96, 48, None, 24]
    kept = [budget or 49 for budget in budgets]
    said = [answers(fresh, [Request(2, keep=budget)])[0] for budget in budgets]
    assert [one.prompt - said[0].prompt for one in said] == [n - 49 for n in kept]
    policies = [
        policy_from({"policy": "fastervlm", "keep": n, "vision_layer": -1, "positions": "pack"}) for n in kept
    ]
    assert [one.ids for one in said] == [reference(question(2), policy) for policy in policies]
    assert len({round(one.logprob, 3) for one in said[:4]}) == 4  # each budget is seen in its answer
    assert encoded == [1, 1, 1, 1]


def test_a_cached_image_beside_a_new_one(fresh, encoded):
    (both_new,) = answers(fresh, [Request(1, 2, 24)])
    forget(fresh)
    answers(fresh, [Request(2, 1, 24)])  # the second picture of the two
    (one_new,) = answers(fresh, [Request(1, 2, 24)])
    assert encoded == [2, 1, 1]
    assert one_new.ids == both_new.ids
    assert one_new.logprob == pytest.approx(both_new.logprob, abs=1e-4)


def test_a_name_given_to_a_picture_does_not_hide_the_budget(fresh):
    named = [
        Request(0, keep=keep).prompt() | {"multi_modal_uuids": {"image": ["photo"]}} for keep in (24, 96, 24)
    ]
    by_hash = answers(fresh, [Request(0, keep=24), Request(0, keep=96)])
    fresh.reset_prefix_cache()
    first, second, third = (heard(said(fresh, [one], logprobs=0))[0] for one in named)
    assert [first.ids, second.ids] == [one.ids for one in by_hash]
    assert second.logprob == pytest.approx(by_hash[1].logprob, abs=1e-4)
    assert second.prompt - first.prompt == 96 - 24
    assert (second.cached, third.cached) == (0, (first.prompt - 1) // BLOCK * BLOCK)


def test_chat_answers_as_generate_does(fresh):
    (picture,) = question(0).images
    file = io.BytesIO()
    picture.save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    asks = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTIONS[0]}]
    budget = {"vlmprune_keep": 24}
    (chat,) = fresh.chat(
        [{"role": "user", "content": asks}], GREEDY, use_tqdm=False, mm_processor_kwargs=budget
    )
    forget(fresh)
    (plain,) = said(fresh, [question(0).prompt(**budget)])
    assert chat.prompt_token_ids == plain.prompt_token_ids
    assert tokens([chat]) == tokens([plain])
