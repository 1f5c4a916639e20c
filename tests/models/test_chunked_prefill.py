"""Chunked prefill: every chunk prunes its own visual tokens; the chunks together equal the masked run."""

from __future__ import annotations

import pytest
import torch

import vlmprune
from helpers.tiny import IMAGE, STEPS, assert_equals_oracle, generate, make_batch, make_model, upstream

FASTV = vlmprune.FastV(layer=2, keep=0.4)


@pytest.fixture(scope="module")
def model():
    return make_model()


CHUNKED = {
    "fastv": FASTV,
    "count": vlmprune.FastV(layer=2, keep=8),
    "feather": vlmprune.Feather(layers=(2, 4), keep=0.5, stride=2),
    "pyramid": vlmprune.PyramidDrop(layers=(2, 4), ratio=(0.5, 0.25), positions="keep"),
    "diverse": vlmprune.DivPrune(keep=8, positions="keep"),
}


@upstream("loses the images of a chunked prefill")
@pytest.mark.parametrize("size", [5, 13])
@pytest.mark.parametrize("policy", CHUNKED.values(), ids=CHUNKED)
def test_chunked_prefill(model, policy, size):
    chunks_equal_oracle(model, [[8, "I", 7, "I", 2], [3, "I", 5], [9]], policy, size)


@upstream("loses the images of a chunked prefill")
@pytest.mark.parametrize("size", [2, 13, 23, 50])
def test_chunked_prefill_of_one_prompt(model, size):
    chunks_equal_oracle(model, [[8, "I", 7, "I"]], FASTV, size)


def chunks_equal_oracle(model, specs, policy, size) -> None:
    batch = make_batch(specs)
    with vlmprune.prune(model, policy) as run:
        tokens, logits, _ = generate(model, batch, STEPS, prefill_chunk_size=size)
    assert_equals_oracle(model, batch, run, tokens, logits)
    images = (batch["input_ids"] == IMAGE).sum(1)
    assert run.stages[0].tokens_in == images.max()
    for sample, count in enumerate(images.tolist()):
        assert run.kept_at(-1, sample).tolist() == list(range(count))
        visual = torch.nonzero(batch["input_ids"][sample] == IMAGE)[:, 0]
        for number, stage in enumerate(run.stages):
            index = stage.index[sample]
            assert torch.equal(visual[run.kept_at(number, sample)], index[index >= 0])


@upstream("loses the images of a chunked prefill")
def test_chunks_share_the_budget_the_grid_and_the_record(model):
    batch = make_batch(
        [[8, "I", 7]]
    )  # 9 rows of text, so chunks of 13 end behind 4 and after 12 more visual tokens
    with vlmprune.prune(model, vlmprune.FastV(layer=2, keep=8)) as run:
        generate(model, batch, 2, prefill_chunk_size=13)
    assert [(run.kept() < 4).sum().item(), (run.kept() >= 4).sum().item()] == [2, 6]
    report, text = run.report(), batch["input_ids"].shape[1] - 16
    assert report.stages == ((2, 16, 8),)
    assert report.visual_tokens == 16
    assert report.tokens.mean_per_layer == (2 * 16 + 4 * 8) / 6
    assert (report.flops.vision > 0, report.seconds.vision > 0, report.seconds.prefill > 0) == (True,) * 3
    assert report.decode_steps == 1
    with vlmprune.prune(model, vlmprune.Uniform(layer=1, stride=2)) as run:
        generate(model, batch, 1, prefill_chunk_size=text + 4)  # behind number 10
    assert run.kept().tolist() == [
        0,
        2,
        8,
        10,
        11,
    ]  # the image's own grid; what has no part in it keeps its first
    with vlmprune.prune(model, FASTV) as run:
        generate(model, batch, 2)
        whole = run.report().flops
        generate(model, batch, 2, prefill_chunk_size=8)
        assert run.report().flops.full == whole.full


@upstream("loses the images of a chunked prefill")
def test_a_second_prompt_is_no_further_chunk(model):
    """One generated token leaves the cache where a chunk would; a new image there starts its own count."""
    batch = make_batch([[8, "I", 7]])
    with vlmprune.prune(model, FASTV) as run:
        generate(model, batch, 2, prefill_chunk_size=10)
        generate(model, batch, 2, prefill_chunk_size=10)
    assert run.report().visual_tokens == 16
    assert run.stages[0].index.max() < batch["input_ids"].shape[1]


def test_a_second_turn_right_after_the_prompt_is_no_further_chunk(model):
    """One new token, not cached yet, leaves the cache as a chunk would; a whole image there begins its own record."""
    batch, more = make_batch([[8, "I", 7]]), make_batch([["I", 3]], seed=3)
    with vlmprune.prune(model, FASTV) as run:
        _, _, first = generate(model, batch, 1)
        ids = torch.cat([first.sequences, more["input_ids"]], 1)
        again = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": more["pixel_values"],
        }
        generate(model, again, 2, past_key_values=first.past_key_values)
    assert run.report().visual_tokens == 16
    assert run.stages[0].tokens_in == 16
    assert run.kept().max() < 16
    assert run.stages[0].index.max() < 1 + more["input_ids"].shape[1]
