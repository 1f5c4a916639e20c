"""Two waves equal one masked run: batches, padding, several images, turns, caches, beams, families."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import pytest
import torch
from transformers import DynamicCache, StaticCache

import vlmprune
from helpers import families, families_oracle, pretended
from helpers.caches import rounded_cache, without_streams
from helpers.recorder import Recorder
from helpers.tiny import (
    IMAGE,
    LAYERS,
    STEPS,
    TOLERANCE,
    dropped_from,
    generate,
    make_batch,
    make_model,
    upstream,
)
from helpers.waves import sets_of, waves_masked, waves_oracle
from vlmprune import DivPrune, Random, Scout, Uniform
from vlmprune.errors import InputError, ModelError
from vlmprune.flops import decoder_flops, prefill_flops
from vlmprune.models.host.parts import decoder_shape
from vlmprune.models.layout import moved
from vlmprune.policies import Needs
from vlmprune.testing import check_model

COARSE = Uniform(layer=0, keep=4)
SCOUT = Scout(coarse=COARSE, fine=3, look=3, by="attention")
DEFAULT = Scout(coarse=COARSE, fine=3, look=3)
BOTH = {"attention": SCOUT, "default": DEFAULT}
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


PADDED = [["I", 9, "I", 4], [3, "I", 5], [12]]


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


@pytest.mark.parametrize("scout", BOTH.values(), ids=BOTH)
def test_beams(plain, scout):
    """The score of every sequence is the masked run's mean log-likelihood of it."""
    batch = make_batch([[4, "I", 7], [2, "I", 3]])
    with vlmprune.prune(plain, scout) as run:
        _, _, out = generate(plain, batch, STEPS, num_beams=2, num_return_sequences=2, output_scores=True)
    sets = sets_of(run)[::2]  # a beam has what its sample has
    for rank in range(2):
        said = out.sequences[rank::2, -STEPS:]
        likely = teacher_forced(plain, batch, sets, said).log_softmax(-1)
        scores = likely.gather(2, said[..., None])[..., 0].mean(1)
        torch.testing.assert_close(out.sequences_scores[rank::2], scores, atol=TOLERANCE, rtol=0)


@torch.no_grad()
def teacher_forced(model, batch, sets, said, past=(), dropped=None):
    """The masked run's logits ``[B, T, V]`` from which ``said [B, T]`` was chosen."""
    ids = torch.cat([batch["input_ids"], said[:, :-1]], 1)
    real = torch.cat([batch["attention_mask"], torch.ones_like(said[:, :-1])], 1)
    places = (real.cumsum(-1) - 1).clamp(min=0)
    with waves_masked(model, SCOUT.look, sets, ids == IMAGE, real.bool(), past, dropped):
        given = {**batch, "input_ids": ids, "attention_mask": real, "position_ids": places}
        return model(**given, use_cache=False).logits[:, -said.shape[1] :]


@pytest.mark.parametrize(
    "cache, by", [("dynamic", "default"), ("static", "default"), ("quantized", "attention")]
)
@pytest.mark.parametrize("more", [["I", 3], [3, "I", 2], [4]], ids=str)
def test_second_turns(plain, more, cache, by, monkeypatch):
    """A turn sees all that the turns before it left; its own tokens come in two waves."""
    first = make_batch([[4, "I", 7], [2, "I", 3]])
    settings = {}
    if cache == "static":
        settings = {"past_key_values": StaticCache(config=plain.config, max_cache_len=96)}
    if cache == "quantized":
        settings = {"past_key_values": rounded_cache(monkeypatch, plain.config, LAYERS)}
    with vlmprune.prune(plain, BOTH[by]) as run:
        _, _, out = generate(plain, first, 3, **settings)
        sets = sets_of(run)
        then = make_batch([more, more], seed=3)
        ids = torch.cat([out.sequences, then["input_ids"]], 1)
        real = torch.ones_like(ids)
        real[:, : first["attention_mask"].shape[1]] = first["attention_mask"]
        turn = {**then, "input_ids": ids, "attention_mask": real}
        tokens, logits, _ = generate(plain, turn, STEPS, past_key_values=out.past_key_values)
        past = out.sequences.shape[1] - 1
        if "I" in more:
            later = [({p + past for p in c}, {p + past for p in f}) for c, f in sets_of(run)]
            sets = [(a | c, b | d) for (a, b), (c, d) in zip(sets, later, strict=True)]
    pixels = [x["pixel_values"] for x in (first, then) if "pixel_values" in x]
    whole = torch.cat(pixels)[[0, 2, 1, 3]] if len(pixels) > 1 else pixels[0]  # each sample's together
    turn["pixel_values"] = whole
    want = teacher_forced(plain, turn, sets, tokens, (past,))
    torch.testing.assert_close(logits, want, rtol=0, atol=0.02 if cache == "quantized" else 2e-4)


def test_behind_a_turn_with_other_stages(plain):
    """The layers that both waves run hold unequal numbers of entries then."""
    first, then = make_batch([[4, "I", 7], [2, "I", 3]]), make_batch([["I", 3], ["I", 3]], seed=3)
    with vlmprune.prune(plain, vlmprune.FastV(layer=2, keep=0.4)) as run:
        out = generate(plain, first, 3)[2]
    gone = dropped_from(run, first)[2]
    ids = torch.cat([out.sequences, then["input_ids"]], 1)
    real = torch.ones_like(ids)
    real[:, : first["attention_mask"].shape[1]] = first["attention_mask"]
    turn, past = {**then, "input_ids": ids, "attention_mask": real}, out.sequences.shape[1] - 1
    with vlmprune.prune(plain, SCOUT) as run:
        tokens, logits, _ = generate(plain, turn, STEPS, past_key_values=out.past_key_values)
    every = [{*torch.nonzero(row == IMAGE)[:, 0].tolist()} for row in first["input_ids"]]
    later = [({p + past for p in c}, {p + past for p in f}) for c, f in sets_of(run)]
    sets = [(a | c, f) for a, (c, f) in zip(every, later, strict=True)]
    turn["pixel_values"] = torch.cat([first["pixel_values"], then["pixel_values"]])[[0, 2, 1, 3]]
    width = ids.shape[1] + STEPS - 1
    dropped = 2, torch.nn.functional.pad(gone, (0, width - gone.shape[1]))
    want = teacher_forced(plain, turn, sets, tokens, (past,), dropped)
    torch.testing.assert_close(logits, want, rtol=0, atol=2e-4)


@pytest.mark.parametrize("pad", ["left", "right"])
def test_every_row_and_the_loss(plain, pad):
    """Not only the last one: coarse, fine and text rows, in front of images, between them and behind."""
    batch = make_batch([["I", 9, "I", 4], [3, "I", 5], [12]], pad=pad)
    ids, real = batch["input_ids"], batch["attention_mask"]
    labels = torch.where((real > 0) & (ids != IMAGE), ids, -100)
    places = (real.cumsum(-1) - 1).clamp(min=0)
    for given in ({}, {"labels": labels}):
        with torch.no_grad(), vlmprune.prune(plain, SCOUT) as run:
            got = plain(**batch, **given, position_ids=places, use_cache=False)
        sets = sets_of(run)
        with torch.no_grad(), waves_masked(plain, SCOUT.look, sets, ids == IMAGE, real.bool()):
            want = plain(**batch, **given, position_ids=places, use_cache=False)
        for b in range(3):
            kept = sets[b][0] | sets[b][1]
            rows = [p for p in range(ids.shape[1]) if real[b, p] and (ids[b, p] != IMAGE or p in kept)]
            torch.testing.assert_close(got.logits[b, rows], want.logits[b, rows], atol=TOLERANCE, rtol=0)
    assert got.loss == pytest.approx(float(want.loss), abs=1e-4)


def test_candidates_behind_the_prompt(plain):
    """Assisted decoding rates candidates with the prompt: they run again, and name nothing."""
    batch = make_batch([[4, "I", 7]])
    with vlmprune.prune(plain, SCOUT) as run:
        want = generate(plain, batch, 6)[0]
        sets = sets_of(run)
        got = generate(plain, batch, 6, prompt_lookup_num_tokens=2)[2].sequences[:, -6:]
    assert torch.equal(got, want)
    ids = torch.cat([batch["input_ids"], want[:, :3]], 1)
    given = {**batch, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad(), vlmprune.prune(plain, SCOUT) as run:
        logits = plain(**given, logits_to_keep=4).logits
    assert sets_of(run) == sets and run.report().second_wave.rows == (13,)
    torch.testing.assert_close(
        logits, teacher_forced(plain, batch, sets, want[:, :4]), atol=TOLERANCE, rtol=0
    )


def test_a_later_stage_and_a_compact_cache(plain):
    """What follows the second wave is a sequence like others."""
    policy = vlmprune.Stages([SCOUT, vlmprune.FastV(layer=4, keep=0.5)], earlier_kv="compact")
    for row in check_model(plain, policy).rows + check_model(plain, SCOUT).rows:
        assert row.verdict == "ok", row


def test_a_sample_in_a_padded_batch_gets_what_it_gets_alone(plain):
    alone = generate_pruned(plain, make_batch([[3, "I", 5]]))
    both = make_batch([["I", 9, "I", 4], [3, "I", 5]])
    one, n = make_batch([[3, "I", 5]]), 25
    both["input_ids"][1, -n:], both["pixel_values"][2] = one["input_ids"][0, -n:], one["pixel_values"][0]
    torch.testing.assert_close(generate_pruned(plain, both)[1:], alone, atol=TOLERANCE, rtol=0)


def generate_pruned(model, batch):
    with vlmprune.prune(model, SCOUT):
        return generate(model, batch, STEPS)[1]


def test_gradients_flow_through_both_waves(plain):
    """The slope along fine tokens' embeddings is what small steps give."""
    batch, moved = make_batch([[4, "I", 7]]), {}

    def embedded(module, args, kwargs):
        moved["x"] = (kwargs["inputs_embeds"].detach() + moved["step"]).requires_grad_()
        return args, {**kwargs, "inputs_embeds": moved["x"]}

    def loss(step):
        moved["step"] = step
        return plain(**batch, use_cache=False).logits[0, -1].log_softmax(-1)[5]

    handle = plain.model.language_model.register_forward_pre_hook(embedded, with_kwargs=True)
    try:
        with vlmprune.prune(plain, SCOUT) as run:
            loss(0.0).backward()
            sets = sets_of(run)
            direction = torch.zeros_like(moved["x"])
            some = [*sets[0][0], *sets[0][1]]
            direction[0, some] = torch.randn(len(some), 64, generator=torch.Generator().manual_seed(0))
            slope = (moved["x"].grad * direction).sum()
            with torch.no_grad():
                steps = (loss(1e-3 * direction) - loss(-1e-3 * direction)) / 2e-3
            assert sets_of(run) == sets
    finally:
        handle.remove()
    assert abs(slope) > 0.1
    torch.testing.assert_close(slope, steps, rtol=0.02, atol=0)


def test_the_oracle_can_fail(plain):
    """Neither one wave nor full passes give what two waves give."""
    batch = make_batch([[4, "I", 7]])
    with vlmprune.prune(plain, SCOUT) as run:
        logits = generate(plain, batch, 1)[1]
    sets = sets_of(run)
    for look, other in ((0, sets), (SCOUT.look, [(sets[0][0] | sets[0][1], set())])):
        want = waves_oracle(plain, batch, look, other, 1, (IMAGE,))[1]
        assert (logits - want).abs().max() > 1e-3


REFUSED = {
    "between": (
        lambda: vlmprune.Stages([SCOUT, vlmprune.Random(layer=2)]),
        r"layers: expected \(0, 3\) first, where a second wave runs, got \(0, 2, 3\)",
    ),
    "too-deep": (lambda: Scout(look=6), "layer: expected at most 5"),
}


@pytest.mark.parametrize("policy, message", REFUSED.values(), ids=REFUSED)
def test_refused(plain, policy, message):
    with pytest.raises(InputError, match=message), vlmprune.prune(plain, policy()):
        pass


def test_refused_where_it_runs(plain):
    batch = make_batch([[4, "I", 7]])
    with pytest.raises(InputError, match="coarse: expected a policy that only drops tokens"):
        generate_with(plain, Scout(coarse=vlmprune.VisionZip(dominant=3, contextual=2), look=3), batch)


@upstream("loses the images of a chunked prefill")
def test_refused_in_chunks(plain):
    batch = make_batch([[4, "I", 7]])
    with pytest.raises(ModelError, match="method that reads the prompt's text, got a prompt in chunks"):
        generate_with(plain, SCOUT, batch, prefill_chunk_size=8)


def generate_with(model, policy, batch, **settings):
    with vlmprune.prune(model, policy):
        return generate(model, batch, 1, **settings)


def test_hidden_states_of_both_waves(plain):
    """What the second wave's layers give stands behind what the first one's gave."""
    batch = make_batch([[4, "I", 7]])
    with torch.no_grad(), vlmprune.prune(plain, SCOUT):
        states = plain(**batch, output_hidden_states=True).hidden_states
    assert [x.shape[1] for x in states] == [16] * 4 + [10] * 3 + [19] * 3


def test_never_a_graph_and_why(plain):
    with torch.no_grad(), vlmprune.prune(plain, SCOUT, vlmprune.Graphs(recorder=Recorder())) as run:
        plain(**make_batch(PADDED), use_cache=True)
    assert run.report().graph == "plain: a stage brings tokens back"


def test_attached_until_detached(plain):
    """Also where a call fails under way: nothing of it is left on the model."""
    batch = make_batch([[4, "I", 7]])
    want = generate(plain, batch, 2)[1]
    run = vlmprune.attach(plain, SCOUT)
    failing = plain.model.language_model.layers[1].register_forward_pre_hook(fail_in_second_wave)
    try:
        with pytest.raises(ZeroDivisionError):
            generate(plain, batch, 2)
        failing.remove()
        got = generate(plain, batch, 2)[1]
        assert run.report().stages == ((0, 16, 4), (3, 16, 7))
    finally:
        failing.remove()
        vlmprune.detach(plain)
    assert not torch.equal(got, want) and torch.equal(generate(plain, batch, 2)[1], want)


def fail_in_second_wave(module, args):
    if args[0].shape[1] == 10:
        raise ZeroDivisionError


@pytest.mark.cpu("is accelerate's main device here")
def test_weights_that_come_and_go():
    """accelerate's hooks bring a layer's weights for the second wave as for the first."""
    accelerate = pytest.importorskip("accelerate")
    model, batch = make_model(), make_batch([[4, "I", 7], [2, "I", 3]])
    want = generate_pruned(model, batch)
    accelerate.cpu_offload(model, execution_device="cpu")
    assert any(p.is_meta for p in model.parameters())
    assert torch.equal(generate_pruned(model, batch), want)


def test_a_prompt_that_ends_with_its_image_and_gets_all_of_it(plain):
    """At once, without a second wave, or half of it later, in a second wave without a row of text."""
    coarse = vlmprune.Custom(0, lambda ctx: torch.arange(16)[None])
    one = vlmprune.Custom(0, lambda ctx: torch.arange(0, 16, 2)[None])
    for policy, kept in ((Scout(coarse=coarse, fine=3, look=3), 16), (Scout(coarse=one, fine=8, look=3), 16)):
        run = assert_equals(plain, policy, make_batch([[3, "I"]]))
        assert run.stages[1].tokens_kept == kept


@dataclass(frozen=True)
class Forgetful(vlmprune.PruningPolicy):
    """Drops at layer 3 some of what has run since layer 0."""

    layers = (0, 3)

    def needs(self, layer):
        return Needs(restored=layer > 0, wave=layer > 0)

    def select(self, ctx):
        first, end = (0, 4) if ctx.layer == 0 else (2, 8)
        return torch.arange(first, end).expand(len(ctx.counts), -1)


def test_what_has_run_has_to_stay(plain):
    """One clear error at the first choice; the rows that are dropped would take the places of others."""
    with pytest.raises(
        InputError, match=r"sample 0: expected every token that has run to stay, got not \[0\]"
    ):
        with vlmprune.prune(plain, Forgetful()), torch.no_grad():
            plain(**make_batch([[4, "I", 7]]))


@pytest.mark.cpu("is the other device here")
@pytest.mark.parametrize("scout", BOTH.values(), ids=BOTH)
def test_layers_on_two_devices(scout):
    """The last layers lie elsewhere, the stage and its decision too: what layer 0 knows is brought there."""
    model, batch = make_model(), make_batch(PADDED)
    with torch.no_grad(), vlmprune.prune(model, scout):
        want = model(**batch).logits[:, -1]
    text, there = model.model.language_model, pretended.DEVICE
    elsewhere = [*text.layers[2:], text.norm, model.lm_head]
    with pretended.pretending(), torch.no_grad(), vlmprune.prune(model, scout) as run:
        for module in (*text.layers[:2], *elsewhere):
            device = there if module in elsewhere else pretended.CPU
            module.to(device).register_forward_pre_hook(partial(bring, device), with_kwargs=True)
        got = model(**batch).logits[:, -1]
        assert [stage.index.device for stage in run.stages] == [pretended.CPU, there]
        torch.testing.assert_close(got.cpu(), want, atol=TOLERANCE, rtol=0)


def bring(device, module, args, kwargs):
    """As a device map's hooks do, which run behind ours."""
    known = {name: x for name, x in kwargs.items() if isinstance(x, torch.Tensor | tuple)}
    return moved(args, device), {**kwargs, **moved(known, device)}
