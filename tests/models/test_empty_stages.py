"""Stages behind which no visual token is left: every layer from there on runs on text alone."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

import vlmprune
from helpers.families import CASES, build
from helpers.tiny import (
    assert_equals_oracle,
    dropped_from,
    generate,
    make_batch,
    make_model,
    masked,
    oracle,
    upstream,
)
from vlmprune.errors import InputError, ModelError
from vlmprune.policies import Needs
from vlmprune.testing import check_model

STEPS = 3
# With text behind its image, ending with its image, nothing but an image, no image.
MIXED = [["I", 9], [4, "I"], ["I"], [12]]
POLICIES = {
    "all-leave": vlmprune.VTW(layer=2),
    "at-once": vlmprune.VTW(layer=0),
    "compact": vlmprune.VTW(layer=3, earlier_kv="compact"),
    "rectified": vlmprune.Stages(
        [vlmprune.FastV(layer=1, keep=0.5), vlmprune.VTW(layer=3)], rectify=True, earlier_kv="compact"
    ),
    "asked-again": vlmprune.Stages(
        [vlmprune.VTW(layer=1), vlmprune.FastV(layer=2), vlmprune.DART(layer=3), vlmprune.Random(layer=4)]
    ),
}


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.mark.parametrize("name", POLICIES)
def test_equals_the_masked_model(model, name):
    check_model(model, POLICIES[name])


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3vl"])
@pytest.mark.parametrize("layer", [0, 1])
def test_families(family, layer):
    """Qwen3-VL adds features to visual tokens behind its first layers, of which none are left here."""
    check_model(build(CASES[family]), vlmprune.VTW(layer))


@pytest.mark.parametrize(
    "policy",
    [POLICIES["all-leave"], POLICIES["asked-again"], vlmprune.WithoutSinks(POLICIES["all-leave"], tau=0.1)],
    ids=repr,
)
def test_a_visual_token_that_ends_a_prompt_stays(model, policy):
    """Alone of its image: its row is the one that the answer goes on from."""
    batch = make_batch(MIXED)
    with vlmprune.prune(model, policy) as run:
        tokens, logits, _ = generate(model, batch, STEPS)
    assert [run.kept(b).tolist() for b in range(4)] == [[], [15], [15], []]
    want_tokens, want_logits, _ = oracle(model, batch, dropped_from(run, batch), STEPS)
    torch.testing.assert_close(logits, want_logits, atol=1e-4, rtol=0)
    assert torch.equal(tokens, want_tokens)


def test_a_visual_token_that_ends_a_prompt_stays_where_the_policy_chooses_by_itself(model, monkeypatch):
    """As in training, the choice is then carried out in other ways than one pass."""
    monkeypatch.setattr(vlmprune.VTW, "ranks", lambda self, layer: False)
    batch = make_batch(MIXED)
    with vlmprune.prune(model, POLICIES["all-leave"]) as run:
        tokens, logits, _ = generate(model, batch, STEPS)
    assert run.report().paths == ("VTW chooses by itself",)
    assert [run.kept(b).tolist() for b in range(4)] == [[], [15], [15], []]
    assert_equals_oracle(model, batch, run, tokens, logits)


@pytest.mark.parametrize("name", ["all-leave", "compact"])
def test_assisted_decoding_answers_as_plain_decoding(model, name):
    batch = make_batch([[4, "I", 7]])
    with vlmprune.prune(model, POLICIES[name]) as run:
        want = generate(model, batch, 5)[0]
        assert torch.equal(generate(model, batch, 5, prompt_lookup_num_tokens=2)[0], want)
    assert run.stages[0].kept == (0,)


def test_beams(model):
    batch = make_batch([[4, "I", 7], [2, "I", 3]])
    with vlmprune.prune(model, POLICIES["all-leave"]) as run:
        got = generate(model, batch, 5, num_beams=3)[0]
    every = {"input_ids": batch["input_ids"].repeat_interleave(3, 0)}
    with masked(model, dropped_from(run, every)):
        want = generate(model, batch, 5, num_beams=3, use_cache=False)[0]
    assert torch.equal(got, want)


def test_the_report(model):
    batch = make_batch([[4, "I", 7]])
    with vlmprune.prune(model, vlmprune.VTW(layer=2)) as run:
        *_, out = generate(model, batch, STEPS)
    report, depth = run.report(), model.config.text_config.num_hidden_layers
    assert report.stages == ((2, 16, 0),) and report.paths[0].startswith("one pass")
    assert report.tokens.after_last_stage == 0
    assert report.tokens.mean_per_layer == report.tokens.resident_kv == 16 * 2 / depth
    # the beginning, four words, an image, seven words; the last answer's token is not run
    held = [layer.keys.shape[2] for layer in out.past_key_values.layers]
    text = batch["input_ids"].shape[1] - 16
    assert held == [16 + text + STEPS - 1] * 2 + [text + STEPS - 1] * (depth - 2)
    assert run.stages[0].index.shape == run.stages[0].ordinals.shape == (1, 0)


@upstream("loses the images of a chunked prefill")
def test_prompts_in_chunks_are_refused(model):
    with pytest.raises(ModelError, match=r"^prefill_chunk_size: expected None with a method that reads"):
        with vlmprune.prune(model, vlmprune.VTW(layer=2)):
            generate(model, make_batch([[4, "I", 7]]), STEPS, prefill_chunk_size=9)


def test_a_policy_that_does_not_say_so_must_keep_one(model):
    batch = make_batch([[4, "I", 7]])
    twice = vlmprune.VTW(layer=2) | vlmprune.VTW(layer=2)  # a union does not say that it may keep none
    with pytest.raises(InputError, match=r"expected at least one of its 16 tokens, got none$"):
        with vlmprune.prune(model, twice):
            generate(model, batch, STEPS)


@dataclass(frozen=True)
class Nothing(vlmprune.PruningPolicy):
    """Keeps nothing, also of a prompt that ends with its image."""

    layer: int = 2
    rows: str = "text"

    def needs(self, layer):
        return Needs(rows=self.rows)

    def empties(self, layer):
        return True

    def select(self, ctx):
        return torch.zeros(len(ctx.counts), 0, dtype=torch.int64, device=ctx.device)


def test_an_answer_that_has_no_row_to_go_on_from_is_refused(model):
    check_model(model, Nothing())
    with pytest.raises(
        InputError, match=r"^Nothing.*: expected the last token of a prompt that ends with its"
    ):
        with vlmprune.prune(model, Nothing()):
            generate(model, make_batch(MIXED), STEPS)
    with pytest.raises(
        InputError, match=r"^Nothing.*\.needs\(2\): expected Needs\(rows='text'\) at a stage that may"
    ):
        vlmprune.prune(model, Nothing(rows="last")).__enter__()
