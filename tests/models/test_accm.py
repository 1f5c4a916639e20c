"""A run with captions equals the same selection on a prompt in which these words had been typed: tokens, logits, loss, cache."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from transformers import StaticCache

import vlmprune
from helpers.families import CASES, build, prompts
from helpers.recorder import Recorder
from helpers.tiny import BOS, EOS, GRID, IMAGE, PAD, STEPS, TOLERANCE, generate, make_model, upstream
from helpers.words import ASSISTANT, BLANK, CLOSE, OPEN, USER, make_tokenizer
from vlmprune.compensation import Known
from vlmprune.policies import Needs, Ranking, quotas

TOKENIZER = make_tokenizer()
I = "image"  # noqa: E741
PROMPTS = {
    "one": [[BOS, USER, I, BLANK, 5, 6, 7, ASSISTANT]],
    "two-images": [[BOS, USER, I, BLANK, I, BLANK, 5, 6, ASSISTANT]],
    "side-by-side": [[BOS, USER, I, I, 5, 6, ASSISTANT]],
    "asked-before": [[BOS, USER, 5, 6, I, BLANK, ASSISTANT]],
    "batch": [
        [BOS, USER, I, 5, 6, 7, ASSISTANT],
        [BOS, USER, OPEN, I, CLOSE, 8, 9, OPEN, I, CLOSE, 10, ASSISTANT],
        [BOS, USER, 5, ASSISTANT],
    ],
}
SELECTIONS = {
    "kept-positions": vlmprune.Uniform(layer=0, keep=5),
    "packed": vlmprune.FasterVLM(keep=4, positions="pack"),
    "merged-and-packed": vlmprune.VisionZip(dominant=4, contextual=2, positions="pack"),
    "merged": vlmprune.VisionZip(dominant=4, contextual=2, positions="keep"),
    "by-share": vlmprune.Random(layer=0, keep=0.3),
}


@pytest.fixture(scope="module")
def model():
    return make_model()


def say(images, candidates):
    """As many words as the question has, then one that tells the image; captions of a batch differ in length."""
    return [
        " ".join(f"w{20 + i}" for i in range(len(x.question.split())))
        + f" w{int(x.features.abs().sum()) % 10 + 40}"
        for x in images
    ]


def accm(selection, compensator=say, **settings):
    settings = {"keep": None, "wording": "w60 {}", "tokenizer": TOKENIZER} | settings
    return vlmprune.ACCM(selection=selection, compensator=compensator, **settings)


def batch_of(samples, pad="left", seed=0):
    """Token ids and pixels; ``I`` is an image."""
    rows = [[t for x in sample for t in ([IMAGE] * GRID**2 if x == I else [x])] for sample in samples]
    width, images = max(map(len, rows)), sum(sample.count(I) for sample in samples)
    fills = [[PAD] * (width - len(row)) for row in rows]
    left = pad == "left"
    ids = [fill + row if left else row + fill for fill, row in zip(fills, rows, strict=True)]
    real = [
        [0] * len(f) + [1] * len(r) if left else [1] * len(r) + [0] * len(f)
        for f, r in zip(fills, rows, strict=True)
    ]
    batch = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(real)}
    if images:
        g = torch.Generator().manual_seed(seed)
        batch["pixel_values"] = torch.randn(images, 3, 14 * GRID, 14 * GRID, generator=g)
    return batch


def typed(samples, captions):
    """The samples with the captions' words in them, each behind its image and what closes that."""
    out = []
    for sample, texts in zip(samples, captions, strict=True):
        new, waiting = [], iter(texts)
        text = None
        for x in sample:
            if text is not None and x not in (BLANK, CLOSE):
                new += TOKENIZER(text, add_special_tokens=False)["input_ids"]
                text = None
            new.append(x)
            if x == I:
                text = f"w60 {next(waiting)}"
        out.append(new)
    return out


@pytest.mark.parametrize("attn", ["sdpa", "eager", "vlmprune"])
@pytest.mark.parametrize("samples", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize("selection", SELECTIONS.values(), ids=SELECTIONS)
def test_equals_the_typed_prompt(model, selection, samples, attn):
    model.set_attn_implementation(attn)
    with vlmprune.prune(model, accm(selection)) as run:
        tokens, logits, _ = generate(model, batch_of(samples), STEPS)
    captions = run.report().captions
    assert [len(texts) for texts in captions] == [sample.count(I) for sample in samples]
    with vlmprune.prune(model, selection) as other:
        want_tokens, want, _ = generate(model, batch_of(typed(samples, captions)), STEPS)
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(logits, want, rtol=0, atol=TOLERANCE)
    assert torch.equal(tokens, want_tokens)
    assert all(torch.equal(run.kept(b), other.kept(b)) for b in range(len(samples)))
    assert run.report().flops.pruned == other.report().flops.pruned
    with vlmprune.prune(model, selection):
        plain = generate(model, batch_of(samples), STEPS)[1]
    assert (plain - want)[0].abs().max() > 0.1  # the words matter


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("selection", ["kept-positions", "packed"])
@pytest.mark.parametrize("second", [[5, 6], [I, BLANK, 9, 8]], ids=["text", "image"])
def test_a_second_turn_keeps_it(model, selection, second, static):
    """The caption stays in the cache; a new image gets one of its own."""
    selection, samples = SELECTIONS[selection], PROMPTS["batch"][:2]
    more = [[USER, *second, ASSISTANT]] * 2

    def turns(policy, samples, said=None):
        cache = StaticCache(config=model.config, max_cache_len=128) if static else None
        with vlmprune.prune(model, policy) as run:
            first = batch_of(samples)
            tokens, logits, out = generate(model, first, 2, past_key_values=cache)
            captions = [run.report().captions]
            then = batch_of(more if said is None else typed(more, said), seed=1)
            ids = torch.cat([first["input_ids"], tokens, then.pop("input_ids")], 1)
            mask = torch.cat(
                [first["attention_mask"], torch.ones_like(tokens), then.pop("attention_mask")], 1
            )
            call = then | {"input_ids": ids, "attention_mask": mask, "past_key_values": out.past_key_values}
            rest = generate(model, call, 3)[1]
            captions.append(run.report().captions)
        return torch.cat([logits, rest], 1), captions

    got, (one, two) = turns(accm(selection), samples)
    assert (two == one) == (I not in second)  # a turn without images is no prompt to describe
    want, _ = turns(selection, typed(samples, one), two if I in second else None)
    torch.testing.assert_close(got, want, rtol=0, atol=2e-4)


@pytest.mark.parametrize("selection", ["kept-positions", "packed"])
def test_samples_of_a_batch_do_not_disturb_one_another(model, selection):
    policy, samples = accm(SELECTIONS[selection]), PROMPTS["batch"]
    batch, images = batch_of(samples), 0
    with vlmprune.prune(model, policy):
        got = generate(model, batch, STEPS)[1]
        for b, sample in enumerate(samples):
            alone = batch_of([sample])
            if I in sample:
                alone["pixel_values"] = batch["pixel_values"][images : images + sample.count(I)]
                images += sample.count(I)
            torch.testing.assert_close(
                got[b : b + 1], generate(model, alone, STEPS)[1], rtol=0, atol=TOLERANCE
            )


@pytest.mark.parametrize("selection", ["kept-positions", "packed"])
def test_beams(model, selection):
    samples = PROMPTS["one"]
    settings = {"num_beams": 3, "max_new_tokens": 4, "do_sample": False, "suppress_tokens": [IMAGE]}
    calls = []

    def counting(images, candidates):
        calls.append(len(images))
        return say(images, candidates)

    batch = batch_of(samples)
    with vlmprune.prune(model, accm(SELECTIONS[selection], counting)) as run:
        got = model.generate(**batch, **settings)
    assert sum(calls) == 1  # not once a beam
    other = batch_of(typed(samples, [run.report().captions[0]]))
    with vlmprune.prune(model, SELECTIONS[selection]):
        want = model.generate(**other, **settings)
    assert torch.equal(got[:, batch["input_ids"].shape[1] :], want[:, other["input_ids"].shape[1] :])


@upstream("mixes up the images of copies with several per sample")
@pytest.mark.parametrize(
    "copies", [{"num_beams": 3}, {"num_return_sequences": 3, "do_sample": True}], ids=["beams", "answers"]
)
def test_copies_of_a_prompt_have_its_known_texts(model, copies):
    policy = accm(SELECTIONS["packed"], Known(["w20", "w21", "w22"]))
    with vlmprune.prune(model, policy) as run:
        model.generate(**batch_of(PROMPTS["batch"]), max_new_tokens=2, suppress_tokens=[IMAGE], **copies)
    assert run.report().captions == (("w20",),) * 3 + (("w21", "w22"),) * 3 + ((),) * 3


@upstream("gets assistants wrong")
def test_prompt_lookup(model):
    """Candidates behind the prompt are no part of the question."""
    samples = [[BOS, USER, I, BLANK, 5, 6, 7, 5, 6, 7, 5, 6, ASSISTANT]]
    asked = []

    def noting(images, candidates):
        asked.extend(x.question for x in images)
        return say(images, candidates)

    policy = accm(SELECTIONS["kept-positions"], noting, tokenizer=make_tokenizer(template=None))
    with vlmprune.prune(model, policy):
        got = generate(model, batch_of(samples), STEPS, prompt_lookup_num_tokens=3)[0]
        want = generate(model, batch_of(samples), STEPS)[0]
    assert torch.equal(got, want)
    assert set(asked) == {"w5 w6 w7 w5 w6 w7 w5 w6 w91"}


@pytest.mark.parametrize("pad", ["left", "right"])
@pytest.mark.parametrize("selection", ["kept-positions", "packed"])
def test_labels(model, selection, pad):
    """The answer's labels are predicted by the same rows, and the loss is the typed prompt's."""
    selection = SELECTIONS[selection]
    samples = [[*sample, 30, 31, EOS] for sample in PROMPTS["batch"][:2]]

    def loss(policy, samples):
        batch = batch_of(samples, pad)
        batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        answer = batch["input_ids"].eq(ASSISTANT).cumsum(1) - batch["input_ids"].eq(ASSISTANT).long() > 0
        labels = batch["input_ids"].masked_fill(~answer | ~batch["attention_mask"].bool(), -100)
        assert (labels >= 0).sum() == 6
        with torch.no_grad(), vlmprune.prune(model, policy) as run:
            out = model(**batch, labels=labels, use_cache=False)
        return out.loss, run, out.logits.shape[1] == batch["input_ids"].shape[1]

    got, run, fits = loss(accm(selection), samples)
    want, *_ = loss(selection, typed(samples, run.report().captions))
    assert fits
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


@pytest.mark.real("torch.utils.checkpoint asks for its random state")
def test_checkpointed_layers_have_the_same_gradients(model):
    batch = batch_of([[*PROMPTS["one"][0], 30, EOS]])
    labels = batch["input_ids"].clone()
    labels[:, :-2] = -100
    grads = []
    for checkpointed in (False, True):
        (model.gradient_checkpointing_enable if checkpointed else model.gradient_checkpointing_disable)()
        model.train()
        model.zero_grad()
        with vlmprune.prune(model, accm(SELECTIONS["kept-positions"])):
            model(**batch, labels=labels, use_cache=False).loss.backward()
        grads.append([p.grad.clone() for p in model.get_decoder().layers.parameters()])
    model.gradient_checkpointing_disable()
    model.eval()
    model.zero_grad(set_to_none=True)
    for plain, replayed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, replayed)


@pytest.mark.parametrize("rectify", [False, True])
@pytest.mark.parametrize("kv", ["full", "compact"])
def test_a_later_stage_sees_the_words_as_text(model, kv, rectify):
    """And compacting the layers before it leaves them in the cache; each stands for itself, as words do that were typed."""
    later = vlmprune.FastV(layer=3, keep=0.5)
    first = SELECTIONS["kept-positions"]
    samples = PROMPTS["batch"]
    whole = {"earlier_kv": kv, "rectify": rectify}
    with vlmprune.prune(model, vlmprune.Stages([accm(first), later], **whole)) as run:
        got = generate(model, batch_of(samples), STEPS)[1]
    with vlmprune.prune(model, vlmprune.Stages([first, later], **whole)):
        want = generate(model, batch_of(typed(samples, run.report().captions)), STEPS)[1]
    torch.testing.assert_close(got, want, rtol=0, atol=2e-4)


@dataclass(frozen=True)
class ByText(vlmprune.PruningPolicy):
    """Half of what the question's rows look at."""

    layers = (3,)

    def needs(self, layer):
        return Needs(attention="previous", rows="text")

    def kept(self, tokens, images, layer):
        return (tokens + 1) // 2

    def rank(self, ctx):
        assert (ctx.attention.rows >= 0).sum(1).tolist() == [*ctx.words]
        return Ranking(ctx.attention.received(), tuple(quotas(ctx, self)))


def test_a_later_stage_that_reads_the_question(model):
    """Words behind what closes the image lie among its rows."""
    policy = vlmprune.Stages([accm(SELECTIONS["kept-positions"]), ByText()])
    with vlmprune.prune(model, policy) as run:
        generate(model, batch_of(PROMPTS["one"]), STEPS)
        assert run.report().stages[1] == (3, 5, 3)
        generate(model, batch_of(PROMPTS["one"] + PROMPTS["batch"]), STEPS)


def test_what_the_compensator_is_shown(model):
    """Features as the projector gives them, the places that go, the question without template; images in prompt order."""
    shown = []

    def noting(images, candidates):
        shown.extend(images)
        assert candidates == 7
        return say(images, candidates)

    samples = PROMPTS["batch"]
    batch = batch_of(samples)
    with vlmprune.prune(model, accm(SELECTIONS["packed"], noting, candidates=7)) as run:
        generate(model, batch, 1)
    features = model.model.get_image_features(batch["pixel_values"]).pooler_output
    assert [x.question for x in shown] == ["w5 w6 w7", "w10", "w10"]  # behind the last image
    for x, want in zip(shown, features, strict=True):
        torch.testing.assert_close(x.features, want)
    lost = set(range(16)) - set(run.kept(0).tolist())
    assert shown[0].dropped.tolist() == sorted(lost)
    kept = set(run.kept(1).tolist())
    assert shown[2].dropped.tolist() == sorted(set(range(16)) - {i - 16 for i in kept})


def test_the_report_says_what_was_written(model):
    caption = vlmprune.compensation.Caption("w20 w21", ("w20 w21", "w22"), flops=1_000_000)
    with vlmprune.prune(model, accm(SELECTIONS["packed"], lambda images, k: [caption] * len(images))) as run:
        generate(model, batch_of(PROMPTS["batch"]), STEPS)
        report = run.report()
        assert report.captions == (("w20 w21",), ("w20 w21", "w20 w21"), ())
        assert report.flops.captions == 3_000_000
        assert report.flops.cut == 1 - (report.flops.pruned + 3_000_000) / report.flops.full
        assert 0 < report.caption_seconds <= report.seconds.selection
        assert run.inserted.captions[0][0].candidates == ("w20 w21", "w22")
        assert run.inserted.sizes == ((3,), (3, 3), ())
        assert report.as_dict()["captions"] == report.captions
        generate(model, batch_of(PROMPTS["batch"]), STEPS)  # the same images and questions again
        assert run.report().flops.captions == 0 and run.report().captions == report.captions
        generate(model, batch_of([PROMPTS["batch"][2]]), 1)  # no image
        assert run.report().captions == () and run.report().caption_seconds == 0


def test_known_texts(model):
    samples = PROMPTS["batch"]
    known = Known(["w20", "", "w21 w22 w23"])
    with vlmprune.prune(model, accm(SELECTIONS["kept-positions"], known)) as run:
        got = generate(model, batch_of(samples), STEPS)[1]
    assert run.inserted.sizes == ((2,), (0, 4), ())
    rows = typed(samples, [["w20"], ["w199", "w21 w22 w23"], []])
    at = rows[1].index(60)
    del rows[1][at : at + 2]  # an empty text adds no wording either
    with vlmprune.prune(model, SELECTIONS["kept-positions"]):
        want = generate(model, batch_of(rows), STEPS)[1]
    torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE)
    with vlmprune.prune(model, accm(SELECTIONS["packed"], Known(["w20"]))):
        with pytest.raises(vlmprune.InputError, match=r"Known\.texts: expected .*3, got 1"):
            generate(model, batch_of(samples), 1)


def test_a_long_text_is_cut_off_at_what_the_image_loses(model):
    samples, long = PROMPTS["one"], " ".join(f"w{i}" for i in range(20, 50))
    with vlmprune.prune(model, accm(SELECTIONS["packed"], lambda images, k: [long])) as run:
        got = generate(model, batch_of(samples), STEPS)[1]
    assert run.inserted.sizes == ((12,),) and run.report().captions == ((long,),)
    cut = " ".join(long.split()[:11])  # one word of the wording before it
    with vlmprune.prune(model, SELECTIONS["packed"]):
        want = generate(model, batch_of(typed(samples, [[cut]])), STEPS)[1]
    torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE)


def test_an_image_that_loses_nothing_beside_one_that_does(model):
    class First(vlmprune.PruningPolicy):
        layers = (0,)

        def select(self, ctx):
            return torch.tensor([[*range(5), *range(16, 32)]])

    with vlmprune.prune(model, accm(First())) as run:
        generate(model, batch_of(PROMPTS["two-images"]), 1)
    (one, other), ((some, none),) = run.report().captions[0], run.inserted.sizes
    assert one and some == 4 and other == "" and none == 0


def test_special_tokens_in_a_text_are_no_special_tokens(model):
    def generated(text):
        with vlmprune.prune(model, accm(SELECTIONS["packed"], lambda images, k: [text])):
            return generate(model, batch_of(PROMPTS["one"]), STEPS)[1]

    torch.testing.assert_close(generated("w20</s> <image> w21"), generated("w20 w21"), rtol=0, atol=0)


def test_what_loses_nothing_is_not_described(model):
    """Keep-all is the unpruned model, and nobody is asked."""

    def never(images, candidates):
        raise AssertionError

    batch = batch_of(PROMPTS["batch"])
    with vlmprune.prune(model, accm(vlmprune.Uniform(layer=0), never, keep=1.0)) as run:
        got = generate(model, batch, STEPS)[1]
    torch.testing.assert_close(got, generate(model, batch, STEPS)[1], rtol=0, atol=0)
    assert run.report().captions == ()


def test_a_compensator_may_ask_the_model_itself(model):
    """In words: its prompts are no part of the report, nor of the time."""

    def asking(images, candidates):
        model.generate(torch.tensor([[BOS, 5, 6]]), max_new_tokens=2, suppress_tokens=[IMAGE])
        return say(images, candidates)

    for policy in (accm(SELECTIONS["packed"]), accm(SELECTIONS["packed"], asking)):
        with vlmprune.prune(model, policy) as run:
            generate(model, batch_of(PROMPTS["one"]), STEPS)
        report = run.report()
        assert report.captions == (("w20 w21 w22 w42",),) and report.stages == ((0, 16, 4),)
        assert report.decode_steps == STEPS - 1
        assert 0 < report.caption_seconds <= report.seconds.selection <= report.seconds.prefill


REFUSED = {
    "nothing is asked": (
        [[BOS, USER, I, ASSISTANT]],
        {},
        r"prompt, sample 0: expected a question .*, got none",
    ),
    "no text behind": (
        [[BOS, USER, 5, I]],
        {"tokenizer": make_tokenizer(template=None)},
        "prompt, sample 0: expected a question",
    ),
}


@pytest.mark.parametrize("samples, settings, text", REFUSED.values(), ids=REFUSED)
def test_prompts_without_room_for_words(model, samples, settings, text):
    with vlmprune.prune(model, accm(SELECTIONS["packed"], **settings)):
        with pytest.raises(vlmprune.InputError, match=text):
            generate(model, batch_of(samples), 1)
    assert not model.model._forward_pre_hooks


def test_what_is_refused(model):
    batch = batch_of(PROMPTS["one"])
    with vlmprune.prune(model, accm(SELECTIONS["packed"], tokenizer=None)):
        with pytest.raises(
            vlmprune.ModelError, match=r"tokenizer: expected one saved with the model .* made in memory"
        ):
            generate(model, batch, 1)
    embeds = model.get_input_embeddings()(batch["input_ids"]).detach()
    with (
        vlmprune.prune(model, accm(SELECTIONS["packed"])),
        pytest.raises(vlmprune.ModelError, match="input_ids: "),
    ):
        model(inputs_embeds=embeds, pixel_values=batch["pixel_values"])
    silent = accm(SELECTIONS["packed"], lambda images, k: [])
    with (
        vlmprune.prune(model, silent),
        pytest.raises(vlmprune.InputError, match="1 captions, one an image, got 0"),
    ):
        generate(model, batch, 1)


@upstream("loses the images of a chunked prefill")
def test_a_prompt_in_chunks_is_refused(model):
    with vlmprune.prune(model, accm(SELECTIONS["packed"])):
        with pytest.raises(vlmprune.ModelError, match="prefill_chunk_size: expected None"):
            generate(model, batch_of(PROMPTS["one"]), 1, prefill_chunk_size=8)


@pytest.mark.parametrize("name", [name for name in CASES if "qwen" not in name])
def test_families(name):
    """Every family with positions of one dimension: the words join behind the image."""
    case = CASES[name]
    model, (inputs, _) = build(case), prompts(case, case.padded)
    policy = accm(vlmprune.Uniform(layer=0, keep=0.3), say, tokenizer=make_tokenizer(template=None))
    with vlmprune.prune(model, policy) as run:
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert all(text for sample in run.report().captions for text in sample)


@pytest.mark.real("reads are found below what is pretended")
def test_a_prefill_with_captions_is_no_graph(model):
    graphs = vlmprune.Graphs(recorder=(recorder := Recorder()))
    for _ in range(3):
        with vlmprune.prune(model, accm(SELECTIONS["packed"]), graphs) as run:
            got = generate(model, batch_of(PROMPTS["batch"]), STEPS)[1]
    assert run.report().graph.startswith("plain: adaptive: ") and recorder.captures == 0
    with vlmprune.prune(model, accm(SELECTIONS["packed"])):
        torch.testing.assert_close(got, generate(model, batch_of(PROMPTS["batch"]), STEPS)[1], rtol=0, atol=0)
