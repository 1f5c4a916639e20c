"""The referee against one prompt at a time, without padding, batches or repetition."""

from dataclasses import replace

import pytest
import torch

from helpers.command_line import CHECKPOINT
from helpers.describers import write_data
from vlmprune import ops, prune
from vlmprune.checkpoints import Checkpoint, build_text, make_inputs
from vlmprune.compensation import Known
from vlmprune.errors import InputError
from vlmprune.images import open_rgb
from vlmprune.training.plan import Plan
from vlmprune.training.referee import Referee
from vlmprune.training.run import captioned_by
from vlmprune.training.samples import Sample, read_samples

TEXTS = [["a large red cup", "yes", ""], ["no", "green green", "row 3"], ["a", "it is a phone", "col 5"]]


@pytest.fixture(scope="module")
def checkpoint():
    return Checkpoint(str(CHECKPOINT), device="cpu", dtype="float32")


@pytest.fixture(autouse=True)
def reference():
    with ops.use_backend("reference"):
        yield


@pytest.fixture
def samples(tmp_path):
    """Of different lengths in prompt and answer: four tokens, three, and one."""
    items = read_samples(write_data(tmp_path / "data")).items
    return [items[0], items[2], items[6]]


def referee(checkpoint, selection="fastervlm", keep=9, rows=None, longest=64):
    plan = Plan(selection=selection, keep=keep)
    return Referee(checkpoint, captioned_by(plan, checkpoint), longest, rows)


@torch.no_grad()
def alone(checkpoint, sample, policy=None):
    """Log-probabilities at the answer's tokens and its end, of the prompt on its own."""
    text = build_text(checkpoint.processor, sample.question, 1)
    inputs = make_inputs(checkpoint.processor, [text], [[open_rgb(sample.image, "image")]], "image")
    answer = checkpoint.processor.tokenizer(sample.answer, add_special_tokens=False)["input_ids"]
    ids = torch.cat([inputs["input_ids"], torch.tensor([answer])], 1)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": inputs["pixel_values"]}
    rows = len(answer) + 1
    if policy is None:
        logits = checkpoint.model(**given).logits[:, -rows:]
    else:
        with prune(checkpoint.model, policy):
            logits = checkpoint.model(**given, logits_to_keep=rows).logits
    return logits[0].double().log_softmax(-1)


@pytest.mark.parametrize("rows", [None, 3, 7])
def test_batches_say_what_single_prompts_say(checkpoint, samples, rows):
    judge = referee(checkpoint, rows=rows)
    captioned = captioned_by(Plan(selection="fastervlm", keep=9), checkpoint)
    case = judge.hear(samples)
    got = judge.divergences(case, TEXTS)
    for number, sample in enumerate(samples):
        full = alone(checkpoint, sample)

        def far(text, sample=sample, full=full):
            other = alone(checkpoint, sample, captioned(Known([text])))
            return (full.exp() * (full - other)).sum(-1).mean().item()

        assert case.silent[number].item() == pytest.approx(far(""), rel=1e-3, abs=1e-5)
        want = [far(text) for text in TEXTS[number]]
        assert got[number].tolist() == pytest.approx(want, rel=1e-3, abs=1e-5)
    assert len({*got.flatten().tolist()}) > 6  # words matter
    torch.testing.assert_close(got[0, 2], case.silent[0], atol=1e-5, rtol=1e-3)  # "" is no words


def test_what_is_shown_knows_neither_the_answer_nor_inference_mode(checkpoint, samples):
    """CDPruner reads the prompt's text: other answers must not change what it keeps."""
    judge = referee(checkpoint, "cdpruner")
    shown = judge.hear(samples).images
    others = [replace(sample, answer="row 1 col 1") for sample in samples]
    for one, other, sample in zip(shown, judge.hear(others).images, samples, strict=True):
        assert torch.equal(one.dropped, other.dropped) and len(one.dropped) == 196 - 9
        assert one.question == other.question and one.question in sample.question
        assert one.features.shape == (196, 256) and not one.features.is_inference()


def test_without_answers_the_same_is_shown(checkpoint, samples):
    judge = referee(checkpoint, "cdpruner")
    for one, other in zip(judge.hear(samples).images, judge.show(samples), strict=True):
        assert torch.equal(one.features, other.features) and torch.equal(one.dropped, other.dropped)
        assert one.question == other.question


def test_a_draw_that_depends_on_the_place_needs_its_place(checkpoint, samples):
    drawn = referee(checkpoint, "random:layer=0")
    with pytest.raises(InputError, match=r"^selection: expected one that chooses alike .*, or rows=3, got"):
        drawn.divergences(drawn.hear(samples), TEXTS)
    drawn = referee(checkpoint, "random:layer=0", rows=3)
    assert drawn.divergences(drawn.hear(samples), TEXTS).shape == (3, 3)


def test_long_answers_are_cut(checkpoint, samples):
    assert referee(checkpoint, longest=2).hear(samples).prompts.counts.tolist() == [3, 3, 2]


def test_bad_samples_are_named(checkpoint, samples, tmp_path):
    bad = Sample("data:7", samples[0].image, "what ?", "<image>")
    with pytest.raises(
        InputError, match=r"^data:7: expected an answer of at least one token, none of them an image"
    ):
        referee(checkpoint).hear([samples[0], bad])
    bad = Sample("data:8", samples[0].image, "<image> <image> ?", "yes")
    with pytest.raises(InputError, match=r"^data:8: prompt: expected 1 x '<image>'"):
        referee(checkpoint).hear([bad])
    torn = tmp_path / "torn.png"
    torn.write_bytes(samples[0].image.read_bytes()[:900])
    with pytest.raises(InputError, match=r"^data:9: expected an image file, got .*torn.png'"):
        referee(checkpoint).hear([Sample("data:9", torn, "what ?", "yes")])
    with pytest.raises(InputError, match=r"^keep: expected fewer visual tokens than an image has, got"):
        referee(checkpoint, keep=196).hear(samples)


@pytest.mark.parametrize("selection", ["fastv:layer=2", "fastervlm + fastv:layer=2"])
def test_selections_that_act_in_the_language_model(checkpoint, selection):
    with pytest.raises(InputError, match=r"^selection: expected a policy that acts at layer 0 alone, got"):
        referee(checkpoint, selection)
