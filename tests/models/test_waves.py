"""Two waves equal one masked run: batches, padding, several images, caches, families; and what they cost."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

import vlmprune
from helpers import families, families_oracle
from helpers.caches import rounded_cache, without_streams
from helpers.tiny import (
    IMAGE,
    LAYERS,
    STEPS,
    TOLERANCE,
    generate,
    make_batch,
    make_model,
)
from helpers.waves import (
    BOTH,
    DEFAULT,
    PADDED,
    SCOUT,
    sets_of,
    waves_oracle,
)
from vlmprune import DivPrune, Random, Scout, Uniform
from vlmprune.flops import decoder_flops, prefill_flops
from vlmprune.models.host.parts import decoder_shape

POLICIES = {
    "lattice": SCOUT,
    "default": DEFAULT,
    "first-layer": Scout(coarse=Random(layer=0, keep=0.3), fine=0.3, look=1, by="random"),
    "last-layer": Scout(coarse=DivPrune(keep=5), fine=2, look=5, spread=0.5),
    "union": Scout(
        coarse=DivPrune(keep=3, positions="keep") | Uniform(layer=0, keep=3), fine=4, look=2, rope=False
    ),
    "all-come-back": Scout(coarse=Random(layer=0, keep=0.2), fine=1.0, look=3),
}
BATCHES = {
    "one": [[4, "I", 7]],
    "two-images": [[2, "I", 3, "I", 5]],
    "image-last": [[3, "I"]],
    "image-first": [["I", 6]],
    "padded-2": [[4, "I", 7], [2, "I", 3]],
    "padded-2-1-0-images": [["I", 9, "I", 4], [3, "I", 5], [12]],
    "long-front-long-back": [[30, "I", 1], ["I", 30]],
    "text-longest": [[50], [2, "I", 3]],
}


@pytest.fixture(scope="module", params=["sdpa", "eager", "vlmprune"])
def model(request):
    return make_model(attn=request.param)


def assert_equals(model, policy, batch, **kwargs):
    with vlmprune.prune(model, policy) as run:
        tokens, logits, _ = generate(model, batch, STEPS, **kwargs)
    want_tokens, want = waves_oracle(model, batch, policy.look, sets_of(run), STEPS, (IMAGE,))
    torch.testing.assert_close(logits, want, atol=TOLERANCE, rtol=0)
    assert torch.equal(tokens, want_tokens)
    return run


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("specs", BATCHES.values(), ids=BATCHES)
def test_equals_the_masked_run(model, specs, policy):
    assert_equals(model, policy, make_batch(specs))


FAMILY_SCOUT = Scout(coarse=Uniform(layer=0, keep=0.3), fine=0.2, look=3)
MODELS: dict[str, torch.nn.Module] = {}


def of_family(name):
    if name not in MODELS:
        MODELS.clear()
        MODELS[name] = families.build(families.CASES[name])
    return families.CASES[name], MODELS[name]


@pytest.mark.parametrize("which", ["one", "padded"])
@pytest.mark.parametrize("name", families.CASES)
def test_families(name, which):
    case, model = of_family(name)
    samples = case.padded if which == "padded" else (case.one,)
    inputs, _ = families.prompts(case, samples)
    with vlmprune.prune(model, FAMILY_SCOUT) as run:
        tokens, logits = families_oracle.generate(model, inputs)
    sets = sets_of(run)
    assert any(fine for _, fine in sets)
    want_tokens, want = waves_oracle(model, inputs, 3, sets, families.STEPS, (families.IMAGE, families.VIDEO))
    torch.testing.assert_close(logits, want, atol=TOLERANCE, rtol=0)
    assert torch.equal(tokens, want_tokens)


@pytest.fixture(scope="module")
def plain():
    return make_model()


@pytest.mark.parametrize(
    "cache, by",
    [
        ("static", "attention"),
        ("static", "default"),
        ("offloaded", "default"),
        ("quantized", "default"),
        ("none", "attention"),
    ],
)
def test_caches(plain, cache, by, monkeypatch):
    scout = BOTH[by]
    batch, settings = make_batch(PADDED), {"cache_implementation": cache}
    if cache == "none":
        settings = {"use_cache": False}
    if cache == "offloaded":
        without_streams(monkeypatch)
    if cache == "quantized":
        settings = {"past_key_values": rounded_cache(monkeypatch, plain.config, LAYERS)}
    with vlmprune.prune(plain, scout) as run:
        tokens, logits, _ = generate(plain, batch, STEPS, **settings)
    if cache == "none":  # every step is a prompt of its own then: the first one's sets are gone
        tokens, logits = tokens[:, :1], logits[:, :1]
        with vlmprune.prune(plain, scout) as run, torch.no_grad():
            plain(**batch, use_cache=False)
    steps = tokens.shape[1]
    want_tokens, want = waves_oracle(plain, batch, scout.look, sets_of(run), steps, (IMAGE,))
    atol = 0.02 if cache == "quantized" else TOLERANCE
    torch.testing.assert_close(logits, want, atol=atol, rtol=0)
    assert torch.equal(tokens, want_tokens)


def test_every_layer_holds_what_came_in_both_waves(plain):
    """Of a prompt coarse and fine tokens and the text, each once; the model's own cache, none of ours."""
    batch = make_batch([[4, "I", 7]])
    with vlmprune.prune(plain, SCOUT) as run:
        out = generate(plain, batch, 2)[2].past_key_values
        report = run.report()
    assert type(out) is DynamicCache
    assert [layer.keys.shape[2] for layer in out.layers] == [12 + 7 + 1] * LAYERS
    assert [layer.get_seq_length() for layer in out.layers] == [29] * LAYERS
    assert report.stages == ((0, 16, 4), (3, 16, 7))
    assert report.tokens.mean_per_layer == report.tokens.after_last_stage == report.tokens.resident_kv == 7


def test_what_it_costs(plain):
    batch = make_batch([[4, "I", 7]])
    with vlmprune.prune(plain, SCOUT) as run:
        generate(plain, batch, 1)
        report = run.report()
    second = report.second_wave
    assert second.layer == 3 and second.rows == (10,)
    shape = decoder_shape(plain.config)
    one, both = decoder_flops(shape, [16] * 3 + [19] * 3), layer_flops(shape, 10, 19)
    assert report.flops.pruned == one + 3 * both
    assert report.flops.pruned == prefill_flops(shape, 16, 12, [(0, 4), (3, 7)], (3, 10))
    seconds = report.seconds
    assert 0 < seconds.second_wave < seconds.prefill
    assert seconds.selection + seconds.second_wave < seconds.prefill


def layer_flops(shape, rows, keys):
    """Written out: matrices for the rows, scores and values for the pairs."""
    width = shape.heads * shape.head_dim
    matrices = 2 * shape.hidden * width + 2 * shape.hidden * shape.kv_heads * shape.head_dim
    matrices += 3 * shape.hidden * shape.intermediate
    return 2 * rows * matrices + 4 * rows * keys * width


def test_a_sample_in_a_padded_batch_gets_what_it_gets_alone(plain):
    alone = generate_pruned(plain, make_batch([[3, "I", 5]]))
    both = make_batch([["I", 9, "I", 4], [3, "I", 5]])
    one, n = make_batch([[3, "I", 5]]), 25
    both["input_ids"][1, -n:], both["pixel_values"][2] = one["input_ids"][0, -n:], one["pixel_values"][0]
    torch.testing.assert_close(generate_pruned(plain, both)[1:], alone, atol=TOLERANCE, rtol=0)


def generate_pruned(model, batch):
    with vlmprune.prune(model, SCOUT):
        return generate(model, batch, STEPS)[1]


def test_the_oracle_can_fail(plain):
    """Neither one wave nor full passes give what two waves give."""
    batch = make_batch([[4, "I", 7]])
    with vlmprune.prune(plain, SCOUT) as run:
        logits = generate(plain, batch, 1)[1]
    sets = sets_of(run)
    for look, other in ((0, sets), (SCOUT.look, [(sets[0][0] | sets[0][1], set())])):
        want = waves_oracle(plain, batch, look, other, 1, (IMAGE,))[1]
        assert (logits - want).abs().max() > 1e-3


def test_a_prompt_that_ends_with_its_image_and_gets_all_of_it(plain):
    """At once, without a second wave, or half of it later, in a second wave without a row of text."""
    coarse = vlmprune.Custom(0, lambda ctx: torch.arange(16)[None])
    one = vlmprune.Custom(0, lambda ctx: torch.arange(0, 16, 2)[None])
    for policy, kept in ((Scout(coarse=coarse, fine=3, look=3), 16), (Scout(coarse=one, fine=8, look=3), 16)):
        run = assert_equals(plain, policy, make_batch([[3, "I"]]))
        assert run.stages[1].tokens_kept == kept
