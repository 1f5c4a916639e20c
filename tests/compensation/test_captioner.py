"""The captioner: mapper against plain tensor code, batches against single images, loss by hand, FLOPs as counted."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from helpers import tiny_compensator as tiny
from vlmprune.compensation import Captioner, Discarded
from vlmprune.errors import InputError

KINDS = ("gpt2", "llama")


def plain_mapper(weights, rows, layers, heads):
    """One image, written out: no modules, no batch, no masks."""
    x = torch.cat([rows @ weights["project.weight"].T + weights["project.bias"], weights["prefix"]])

    def norm(x, name):
        spread = (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return (x - x.mean(-1, keepdim=True)) / spread * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    for i in range(layers):
        block = f"blocks.{i}"
        y = norm(x, f"{block}.attention_norm")
        q, k, v = (y @ weights[f"{block}.query_key_value.weight"].T).chunk(3, -1)
        width = q.shape[1] // heads
        mixed = []
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            mixed.append((q[:, part] @ k[:, part].T / width**0.5).softmax(-1) @ v[:, part])
        x = x + torch.cat(mixed, -1) @ weights[f"{block}.out.weight"].T + weights[f"{block}.out.bias"]
        y = norm(x, f"{block}.norm") @ weights[f"{block}.up.weight"].T + weights[f"{block}.up.bias"]
        x = x + y.relu() @ weights[f"{block}.down.weight"].T + weights[f"{block}.down.bias"]
    return x[len(rows) :]


def test_the_mapper_is_what_the_paper_says_for_any_number_of_tokens():
    captioner, images = tiny.captioner(), tiny.images()
    prefixes = captioner.prefixes(images)
    weights = captioner.mapper.state_dict()
    assert prefixes.shape == (4, 4, tiny.WIDTH)
    for image, prefix in zip(images, prefixes, strict=True):
        expected = plain_mapper(weights, image.features[image.dropped], layers=4, heads=2)
        torch.testing.assert_close(prefix, expected)


def test_the_order_of_the_dropped_tokens_does_not_matter():
    captioner, image = tiny.captioner(), tiny.image(9)
    turned = Discarded(image.features, image.dropped.flip(0), image.question)
    torch.testing.assert_close(captioner.prefixes([image]), captioner.prefixes([turned]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("candidates", [1, 3])
def test_a_batch_gives_what_each_image_gives_alone(kind, candidates):
    captioner, images = tiny.captioner(kind), tiny.images()
    together = captioner.write(images, candidates)
    assert together == [captioner.write([image], candidates)[0] for image in images]
    assert len({texts[0] for texts in together}) > 1 and all(len(texts) == candidates for texts in together)
    sums, counts = captioner.log_likelihood(images, [texts[0] for texts in together])
    for i, image in enumerate(images):
        alone, count = captioner.log_likelihood([image], together[i][:1])
        torch.testing.assert_close(sums[i : i + 1], alone)
        assert counts[i] == count


@pytest.mark.parametrize("kind", KINDS)
def test_the_caption_depends_on_tokens_and_question(kind):
    captioner, image = tiny.captioner(kind), tiny.image(6)
    others = [tiny.image(6, seed=9), tiny.image(5), tiny.image(6, question="where is the blue dog")]
    sums, _ = captioner.log_likelihood([image, *others], ["the red cat"] * 4)
    assert ((sums[1:] - sums[0]).abs() > 0.05).all()


@pytest.mark.parametrize("kind", KINDS)
def test_candidates_are_those_of_a_beam_search_likeliest_first(kind):
    """By the same measure as generate: log p over length."""
    captioner, image = tiny.captioner(kind), tiny.image(6)
    (texts,) = captioner.write([image], 4)
    assert len({*texts}) == 4
    sums, counts = captioner.log_likelihood([image] * 4, texts)
    means = (sums / counts).tolist()
    ended = [mean for mean, count in zip(means, counts.tolist(), strict=True) if count < 8]
    assert ended == sorted(ended, reverse=True)


def test_one_candidate_is_greedy():
    captioner, image = tiny.captioner(), tiny.image(6)
    embed = captioner.language_model.get_input_embeddings()
    question = torch.tensor(captioner.tokenizer(image.question)["input_ids"])
    row, ids = torch.cat([embed(question), captioner.prefixes([image])[0]]), []
    while len(ids) < 8 and 1 not in ids:
        scores = captioner.language_model(inputs_embeds=row[None]).logits[0, -1]
        scores[[0, 2]] = -torch.inf  # padding and unknown are never written
        ids.append(int(scores.argmax()))
        row = torch.cat([row, embed(torch.tensor(ids[-1:]))])
    assert captioner.write([image], 1) == [[captioner.tokenizer.decode(ids, skip_special_tokens=True)]]


def likelihood_of(captioner, image, ids):
    """Sum of log p of these tokens, by a separate way: one unpadded sequence, token by token."""
    embed = captioner.language_model.get_input_embeddings()
    question = torch.tensor(captioner.tokenizer(image.question)["input_ids"])
    row = torch.cat([embed(question), captioner.prefixes([image])[0], embed(ids)])
    logits = captioner.language_model(inputs_embeds=row[None]).logits[0].log_softmax(-1)
    start = len(question) + captioner.config.prefix - 1
    return sum(logits[start + i, token].item() for i, token in enumerate(ids.tolist()))


@pytest.mark.parametrize("kind", KINDS)
def test_the_likelihood_is_that_of_the_caption_and_its_end(kind):
    captioner, images = tiny.captioner(kind), tiny.images()[:3]
    texts = ["the red cat", "", "a a a a a a a a a a a"]
    sums, counts = captioner.log_likelihood(images, texts)
    assert counts.tolist() == [4, 1, 8]  # the third is longer than max_new_tokens
    for total, image, text in zip(sums.tolist(), images, texts, strict=True):
        ids = [*captioner.tokenizer(text)["input_ids"], 1][:8] if text else [1]
        assert total == pytest.approx(likelihood_of(captioner, image, torch.tensor(ids)), rel=1e-4)


def test_the_likelihood_trains_mapper_and_language_model():
    captioner = tiny.captioner()
    captioner.log_likelihood(tiny.images(), ["cat"] * 4)[0].sum().neg().backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in captioner.parameters())


def test_another_end_belongs_to_the_caption():
    captioner, image = tiny.captioner(end="."), tiny.image(6)
    end = captioner.tokenizer.convert_tokens_to_ids(".")
    with torch.no_grad():
        captioner.language_model.lm_head.weight[end] *= 3
    texts = [text for texts in captioner.write(tiny.images(), 3) for text in texts]
    assert any(text.endswith(".") for text in texts) and all("." not in text[:-1] for text in texts)
    (_, counts) = captioner.log_likelihood([image, image], ["a cat .", "a cat"])
    assert counts.tolist() == [3, 3]


def test_writing_has_no_dropout_and_leaves_modes_alone():
    captioner, images = tiny.captioner(), tiny.images()
    expected = captioner.write(images, 2)
    captioner.train()
    captioner.mapper.eval()
    assert captioner.write(images, 2) == expected == captioner.write(images, 2)
    assert captioner.language_model.training and not captioner.mapper.training


def test_a_question_that_does_not_fit_loses_its_end():
    captioner = tiny.captioner(context=16, prefix=4, max_new_tokens=8)  # leaves the question 4 tokens
    long = tiny.image(6, question="what is the red cat left of")
    assert captioner.write([long], 3) == captioner.write([tiny.image(6, question="what is the red")], 3)
    assert captioner.write([long], 3) != captioner.write([tiny.image(6, question="red cat left of")], 3)


def test_a_context_too_short_for_any_question_is_an_error():
    message = (
        r"language_model: expected a context of more than 12 tokens \(prefix 4 \+ max_new_tokens 8\), got 12"
    )
    with pytest.raises(InputError, match=message):
        tiny.captioner(context=12, prefix=4, max_new_tokens=8)
    captioner = tiny.captioner(context=13)
    captioner.config.max_new_tokens = 9
    with pytest.raises(InputError, match="more than 13 tokens"):
        captioner.write([tiny.image(3)], 1)


def test_bad_input():
    captioner, image = tiny.captioner(), tiny.image(3)
    narrow = Discarded(torch.randn(5, 7), torch.tensor([0]), "what")
    with pytest.raises(
        InputError, match=r"features: expected \[tokens, 24\], as the captioner was made for, got \[5, 7\]"
    ):
        captioner.write([image, narrow], 1)
    for question in ("", "  \n"):
        with pytest.raises(InputError, match="question: expected words, got '"):
            captioner.write([tiny.image(3, question=question)], 1)
    with pytest.raises(InputError, match="images: expected at least one, got 0"):
        captioner.write([], 1)
    with pytest.raises(InputError, match="candidates: expected at least 1, got 0"):
        captioner.write([image], 0)
    with pytest.raises(InputError, match="texts: expected one for each of 1 images, got 2"):
        captioner.log_likelihood([image], ["cat", "dog"])


def test_bad_parts():
    model = tiny.language_model()
    with pytest.raises(InputError, match="tokenizer: expected the language model's tokenizer, got None"):
        Captioner.make(tiny.FEATURES, model)
    with pytest.raises(InputError, match="end: expected one token of the tokenizer, got 'zebra'"):
        tiny.captioner(end="zebra")
    with pytest.raises(InputError, match="heads: expected a divisor of the width 16, got 3"):
        tiny.captioner(heads=3)
    endless = tiny.tokenizer()
    endless.eos_token = None
    with pytest.raises(InputError, match="tokenizer: expected one with an end-of-text token"):
        Captioner.make(tiny.FEATURES, model, endless)


def test_the_language_model_is_taken_as_it_is():
    model = tiny.language_model()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    captioner = Captioner.make(tiny.FEATURES, model, tiny.tokenizer(), heads=2, max_new_tokens=8)
    assert captioner.language_model is model
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_from_a_checkpoint(tmp_path):
    model = tiny.language_model("llama")
    model.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    made = Captioner.make(tiny.FEATURES, tmp_path, heads=2, max_new_tokens=3)
    weights = made.language_model.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    assert all(len(text.split()) <= 3 for text in made.write([tiny.image(3)], 2)[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("candidates", [1, 3])
def test_flops_are_those_that_run(kind, candidates):
    captioner, images = tiny.captioner(kind), tiny.images()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        drafts = captioner.draft(images, candidates)
    assert drafts.flops == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_features_of_any_type_and_without_gradients():
    captioner, image = tiny.captioner(), tiny.image(6)
    bfloat = Discarded(image.features.bfloat16().requires_grad_(), image.dropped, image.question)
    rounded = Discarded(image.features.bfloat16().float(), image.dropped, image.question)
    with torch.inference_mode():
        assert captioner.write([bfloat], 2) == captioner.write([rounded], 2)
    captioner.to(torch.bfloat16)
    assert len(captioner.write([image], 2)[0]) == 2


def test_the_checkpoints_own_way_of_generating_has_no_say():
    captioner, images = tiny.captioner(), tiny.images()
    expected = captioner.write(images, 3)
    own = {"repetition_penalty": 9.0, "length_penalty": -4.0, "do_sample": True, "max_length": 20}
    captioner.language_model.generation_config.update(**own)
    assert captioner.write(images, 3) == expected


def test_bfloat16_stays_it(tmp_path):
    tiny.captioner().to(torch.bfloat16).save_pretrained(tmp_path)
    assert {weight.dtype for weight in Captioner.from_pretrained(tmp_path).parameters()} == {torch.bfloat16}


def test_save_and_load(tmp_path):
    for kind in KINDS:
        captioner = tiny.captioner(kind, end=".")
        captioner.save_pretrained(tmp_path / kind)
        loaded = Captioner.from_pretrained(tmp_path / kind)
        ours, theirs = captioner.state_dict(), loaded.state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert loaded.write(tiny.images(), 3) == captioner.write(tiny.images(), 3)
        assert loaded.config.to_diff_dict() == captioner.config.to_diff_dict()
