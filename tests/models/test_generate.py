"""Every way of generating gives what the oracle, or plain pruned decoding, gives."""

from __future__ import annotations

import pytest
import torch
import transformers
from packaging import version
from transformers import LlamaConfig, LlamaForCausalLM

import vlmprune
from helpers.tiny import (
    BEFORE_PREFILL,
    BOS,
    EOS,
    IMAGE,
    PAD,
    TOLERANCE,
    dropped_from,
    generate,
    make_batch,
    make_model,
    masked,
    upstream,
)

FASTV = vlmprune.FastV(layer=2, keep=0.4)
WINDOWED = vlmprune.VScan(layer=3, keep=8, then=4, window=2, shallow_layer=1, positions="pack")


@pytest.fixture(scope="module")
def model():
    return make_model()


def sequences(model, batch, **kwargs):
    with torch.no_grad():
        out = model.generate(
            **batch,
            max_new_tokens=6,
            output_logits=True,
            return_dict_in_generate=True,
            suppress_tokens=[IMAGE],
            **kwargs,
        )
    return out.sequences, torch.stack(out.logits, 1)


# Beams and sampling: every row of the expanded batch equals the masked model's, which recomputes everything.

UNEQUAL = [[4, "I", 7], [2, "I", 3, "I", 5]]
EXPANDED = {
    "beams": ([[4, "I", 7]], 3, {"num_beams": 3}),
    "beams-batch": ([[4, "I", 7], [2, "I", 3]], 3, {"num_beams": 3}),
    "beams-unequal-images": (UNEQUAL, 3, {"num_beams": 3}),
    "beams-returned": ([[4, "I", 7], [2, "I", 3]], 3, {"num_beams": 3, "num_return_sequences": 2}),
    "samples": ([[4, "I", 7], [2, "I", 3]], 2, {"do_sample": True, "num_return_sequences": 2, "top_k": 20}),
}


@pytest.mark.parametrize("case", EXPANDED)
@pytest.mark.parametrize("policy", [FASTV, vlmprune.Feather(layers=(1, 4))], ids=["fastv", "feather"])
def test_beams_and_samples(model, case, policy):
    specs, copies, settings = EXPANDED[case]
    if case == "beams-unequal-images" and not BEFORE_PREFILL:
        pytest.skip("transformers < 5.18 itself mixes up the images of beams with unequal image counts")
    settings = {"do_sample": False, **settings}
    batch = make_batch(specs)
    with vlmprune.prune(model, policy) as run:
        torch.manual_seed(5)
        got, logits = sequences(model, batch, **settings)
    every = {"input_ids": batch["input_ids"].repeat_interleave(copies, 0)}
    with masked(model, dropped_from(run, every)):
        torch.manual_seed(5)
        want, want_logits = sequences(model, batch, use_cache=False, **settings)
    assert torch.equal(got, want)
    torch.testing.assert_close(logits, want_logits, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    "policy", [vlmprune.VisionZip(positions="pack"), WINDOWED], ids=["visionzip", "vscan"]
)
@pytest.mark.parametrize(
    "specs",
    [
        [[4, "I", 7], [2, "I", 3]],
        pytest.param(UNEQUAL, marks=upstream("mixes up the images of beams with several per sample")),
    ],
    ids=["one-each", "unequal"],
)
def test_beams_of_methods_that_read_the_vision_tower(model, policy, specs):
    """Images are encoded once and then repeated: each beam finds its own sample's."""
    batch = make_batch(specs)
    with vlmprune.prune(model, policy) as run:
        generate(model, batch, 1)
        plain = [stage.index for stage in run.stages]
        sequences(model, batch, num_beams=3, do_sample=False)
    for stage, index in zip(run.stages, plain, strict=True):
        assert torch.equal(stage.index, index.repeat_interleave(3, 0))


# Candidates that assisted decoding puts behind the prompt change neither the choice nor the text.

READERS = {
    "last-row": FASTV,
    "all-rows": vlmprune.FastV(layer=2, keep=0.4, rows="mean"),
    "no-rope": vlmprune.Feather(layers=(2, 4), keep=0.5),
    "own-layer": vlmprune.PyramidDrop(layers=(2, 4), positions="pack"),
    "text-rows": vlmprune.SparseVLM(layers=(2, 3), keep=(10, 5), positions="pack"),
    "merged-packed": vlmprune.VisionZip(positions="pack"),
    "compacted": vlmprune.FastV(layer=2, keep=0.4, earlier_kv="compact"),
}


def same_as_plain(model, batch, policy, **settings) -> None:
    with vlmprune.prune(model, policy) as run:
        want, _, _ = generate(model, batch, 12)
        stages = run.stages
        got, _, _ = generate(model, batch, 12, **settings)
    assert torch.equal(got, want)
    assert len(run.stages) == len(stages) > 0
    for stage, plain in zip(run.stages, stages, strict=True):
        assert torch.equal(stage.index, plain.index)


@pytest.fixture(scope="module")
def assistant():
    torch.manual_seed(1)
    size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    return LlamaForCausalLM(LlamaConfig(vocab_size=200, **size, **ids)).eval()


@pytest.mark.parametrize("policy", READERS.values(), ids=READERS)
def test_prompt_lookup(model, policy):
    batch = make_batch([[8, "I", 7]])
    batch["input_ids"][0, -1] = batch["input_ids"][0, 2]  # so that there is something to look up
    same_as_plain(model, batch, policy, prompt_lookup_num_tokens=4, max_matching_ngram_size=1)


@pytest.mark.skipif(
    version.parse(transformers.__version__) < version.parse("5.24"),
    reason="transformers < 5.24 refuses assisted decoding with a static cache",
)
@pytest.mark.parametrize("policy", READERS.values(), ids=READERS)
def test_prompt_lookup_with_a_static_cache(model, policy):
    """Rejected candidates are cropped off a preallocated cache: what is written next is valid again.

    With room for candidates beyond the last token: transformers itself makes none.
    """
    batch = make_batch([[8, "I", 7]])
    batch["input_ids"][0, -1] = batch["input_ids"][0, 2]
    settings = {"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 1}
    cache = transformers.StaticCache(config=model.config, max_cache_len=64)
    same_as_plain(model, batch, policy, cache=cache, **settings)


@upstream("passes pixel values to the assistant")
@pytest.mark.parametrize("policy", READERS.values(), ids=READERS)
@pytest.mark.parametrize("specs", [[8, "I", 7], [8, "I"]], ids=["text-last", "image-last"])
def test_assistant_model(model, assistant, policy, specs):
    if specs[-1] == "I" and policy is READERS["text-rows"]:
        pytest.skip("no text after the image that could rate it")
    same_as_plain(model, make_batch([specs]), policy, assistant_model=assistant)


def test_rating_a_given_answer_scores_with_the_question(model):
    """The logits of an answer's tokens are those of decoding them: the choice does not look ahead."""
    batch = make_batch([[8, "I", 7]])
    with torch.no_grad(), vlmprune.prune(model, FASTV) as run:
        answer, logits, _ = generate(model, batch, 4)
        index = run.stages[0].index
        batch["input_ids"] = torch.cat([batch["input_ids"], answer], 1)
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        rated = model(**batch, logits_to_keep=5).logits[:, :-1]
        assert torch.equal(run.stages[0].index, index)
        model(
            **batch, logits_to_keep=batch["input_ids"].shape[1]
        )  # all logits: nothing is said to be an answer
        assert not torch.equal(run.stages[0].index, index)
    torch.testing.assert_close(rated, logits, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("policy", READERS.values(), ids=READERS)
def test_the_scoring_row_is_found_before_padding_on_the_right(model, policy):
    specs = [[4, "I", 7], [2, "I", 3]]
    kept = []
    for pad in ("left", "right"):
        batch = make_batch(specs, pad=pad)
        positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad(), vlmprune.prune(model, policy) as run:
            model(**batch, position_ids=positions, use_cache=False)
        kept.append([run.kept_at(s, b).tolist() for s in range(len(run.stages)) for b in range(2)])
    assert kept[0] == kept[1]


# Classifier-free guidance runs the model on a prompt without images in between.


def test_guidance_leaves_the_record_of_the_conditional_pass(model):
    batch = make_batch([[4, "I", 7]])
    with vlmprune.prune(model, FASTV) as run:
        _, logits, _ = generate(model, batch, 1)
        _, guided, _ = generate(model, batch, 3, guidance_scale=1.5)
        assert run.stages[0].tokens_kept == 6
        assert run.report().visual_tokens == 16
    torch.testing.assert_close(guided[:, :1], logits, atol=0, rtol=0)


def test_hidden_states_are_short_after_the_stage(model):
    """Entry i is what enters layer i, before a stage there drops anything; later ones hold the surviving rows only."""
    batch = make_batch([[4, "I", 7]])
    with torch.no_grad(), vlmprune.prune(model, FASTV) as run:
        got = model(**batch, output_hidden_states=True, use_cache=False)
    with torch.no_grad(), masked(model, dropped_from(run, batch)):
        want = model(**batch, output_hidden_states=True, use_cache=False)
    full = batch["input_ids"].shape[1]
    text = (batch["input_ids"][0] != IMAGE).nonzero()[:, 0]
    rows = torch.cat([text, run.stages[0].index[0]]).sort().values
    assert [h.shape[1] for h in got.hidden_states] == [full] * 3 + [len(rows)] * 4
    assert got.logits.shape[1] == full
    for number, (short, long) in enumerate(zip(got.hidden_states, want.hidden_states, strict=True)):
        long = long if number <= 2 else long[:, rows]
        torch.testing.assert_close(short, long, atol=TOLERANCE, rtol=0)


def test_a_generated_image_token_is_text():
    """A placeholder id in the answer brings no image: it goes on like the word that has the same embedding."""
    model, batch = make_model(), make_batch([[4, "I", 7]])
    weight = model.get_input_embeddings().weight
    weight.data[IMAGE] = weight.data[7]
    prompt, seen = batch["input_ids"].shape[1], []
    for word in (IMAGE, 7):

        def allowed(sample, ids, word=word):
            return [word] if len(ids) == prompt else list(range(3, 198))

        with torch.no_grad(), vlmprune.prune(model, FASTV) as run:
            out = model.generate(
                **batch,
                max_new_tokens=4,
                do_sample=False,
                prefix_allowed_tokens_fn=allowed,
                output_logits=True,
                return_dict_in_generate=True,
            )
            assert out.sequences[0, prompt] == word
            index = run.stages[0].index
            ids = torch.cat(
                [out.sequences, torch.tensor([[5, 9]])], 1
            )  # a second turn, with the word before it
            again = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            _, more, _ = generate(model, again, 2, past_key_values=out.past_key_values)
        assert torch.equal(run.stages[0].index, index)
        seen.append([*out.logits, *more.unbind(1)])
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
