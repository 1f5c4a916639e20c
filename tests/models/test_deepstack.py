"""Qwen3-VL's DeepStack features, which belong to visual tokens behind the first layers: they get shorter with the rows."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import transformers as hf

import vlmprune
from helpers import families_oracle
from helpers.families import CASES, IMAGE, build, placed, prompts
from helpers.recorder import Recorder
from helpers.tiny import masked, upstream
from vlmprune import Custom, FastV, Graphs, Random, Stages
from vlmprune.errors import ModelError
from vlmprune.models.graphs.reads import HostReads
from vlmprune.models.prefill import Prefill
from vlmprune.policies.base import Needs, PruningPolicy, Reduction, TokenContext
from vlmprune.testing import check_model

NAMES = ("qwen3vl", "qwen3vl-video")


@dataclass(frozen=True)
class Moved(PruningPolicy):
    """A random half, backwards, each row half way to the first visual token: the features stay those of the token."""

    layer: int = 0

    @property
    def layers(self) -> tuple[int, ...]:
        return (self.layer,)

    def kept(self, tokens: int, images: int, layer: int) -> int:
        return Random(self.layer).kept(tokens, images, layer)

    def needs(self, layer: int) -> Needs:
        return Needs(hidden=True)

    def select(self, ctx: TokenContext) -> Reduction:
        index = Random(self.layer).rank(ctx).index(ctx).sort(1, descending=True).values
        rows = ctx.hidden.gather(1, index.clamp(min=0)[..., None].expand(-1, -1, ctx.hidden.shape[2]))
        return Reduction(index, rows.lerp(ctx.hidden[:, :1], 0.5))


POLICIES = {
    "embeddings": vlmprune.DivPrune(keep=3, positions="keep"),
    "layer 0": Random(0, keep=0.4),
    "layer 1": FastV(layer=1, keep=0.4),
    "layer 2": vlmprune.PyramidDrop(layers=(2,), ratio=(0.4,), positions="keep"),
    "every layer": Stages([Random(i, keep=0.8, seed=i) for i in range(4)]),
    "moved at 0": Moved(),
    "moved at 1": Moved(1),
    "moved twice": Stages([Moved(), Moved(2)]),
    "compact": FastV(layer=1, keep=0.4, earlier_kv="compact"),
}
EARLY = Stages([Random(0, keep=0.6), FastV(layer=1, keep=0.7)])


@pytest.fixture(scope="module")
def model():
    return build(CASES["qwen3vl"])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_pruned_runs_are_masked_runs(model, policy, name):
    case = CASES[name]
    report = check_model(model, policy, samples={"one": [case.one], "padded": case.padded})
    assert [row.verdict for row in report.rows] == ["ok"] * 6


def test_the_oracle_sees_features_that_are_lost_or_another_tokens(model, monkeypatch):
    samples, right = {"padded": CASES["qwen3vl"].padded}, Prefill.deepened
    monkeypatch.setattr(Prefill, "deepened", lambda self, i, hidden: hidden)
    assert not check_model(model, EARLY, strict=False, samples=samples).ok

    def shifted(self, i, hidden):
        planes, self.planes = self.planes, tuple(x.roll(1, 0) for x in self.planes)
        hidden = right(self, i, hidden)
        self.planes = planes
        return hidden

    monkeypatch.setattr(Prefill, "deepened", shifted)
    assert not check_model(model, EARLY, strict=False, samples=samples).ok


@pytest.mark.parametrize("attention", ["eager", "vlmprune"])
def test_attention_implementations(attention):
    case, model = CASES["qwen3vl"], build(CASES["qwen3vl"])
    model.set_attn_implementation(attention)
    assert check_model(model, EARLY, samples={"padded": case.padded}).ok


def test_a_stage_behind_the_features_leaves_them_to_the_text_model(model, monkeypatch):
    asked = []
    monkeypatch.setattr(Prefill, "deepened", lambda self, i, hidden: (asked.append(self.planes), hidden)[1])
    inputs, _ = prompts(CASES["qwen3vl"], CASES["qwen3vl"].padded)
    for layer, count in ((1, 2), (2, 0)):
        with torch.no_grad(), vlmprune.prune(model, Random(layer)):
            model(**inputs)
        assert {len(planes) for planes in asked} == {count}
        asked.clear()


@pytest.mark.parametrize("policy", [*POLICIES.values(), None], ids=[*POLICIES, "unpruned"])
@pytest.mark.parametrize("samples", ["one", "padded"])
@pytest.mark.real("no graph is made where a dispatch mode watches, as the pretended device does")
def test_graphs(model, policy, samples):
    case, graphs = CASES["qwen3vl"], Graphs(recorder=(recorder := Recorder()))

    def answer(inputs, graphs):
        with (
            vlmprune.meter(model, graphs) if policy is None else vlmprune.prune(model, policy, graphs) as run
        ):
            return *families_oracle.generate(model, inputs), run.report().graph

    for seed in range(3):
        inputs, _ = prompts(case, (case.one,) if samples == "one" else case.padded, seed)
        got, want = answer(inputs, graphs), answer(inputs, None)
        assert torch.equal(got[0], want[0])
        torch.testing.assert_close(got[1], want[1], atol=1e-4, rtol=0)
    assert got[2].startswith("replayed") and recorder.replays == 2


@upstream("loses the images of a chunked prefill")
def test_chunks_that_are_not_pruned(model):
    inputs, _ = prompts(CASES["qwen3vl"], CASES["qwen3vl"].padded)
    want = families_oracle.generate(model, inputs, prefill_chunk_size=7)[1]
    with vlmprune.meter(model, Graphs(recorder=Recorder())):
        assert torch.equal(families_oracle.generate(model, inputs, prefill_chunk_size=7)[1], want)


@pytest.mark.parametrize("static", [False, True])
def test_a_second_turn_with_an_image(model, static):
    """Features of the second turn's tokens are added to its own rows, behind a pruned cache."""
    case = CASES["qwen3vl"]
    turns = [prompts(case, [samples], seed=n)[0] for n, samples in enumerate((case.one, (2, "tall", 4)))]
    by_sample = ("input_ids", "attention_mask", "mm_token_type_ids")
    whole = {name: torch.cat([turn[name] for turn in turns], int(name in by_sample)) for name in turns[0]}
    told = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
    places, _ = model.model.get_rope_index(**{name: whole[name] for name in told})
    past = turns[0]["input_ids"].shape[1]

    def second(policy):
        cache = hf.StaticCache(config=model.config, max_cache_len=96) if static else hf.DynamicCache()
        seen = {"attention_mask": whole["attention_mask"], "position_ids": places[..., past:]}
        with (
            torch.no_grad(),
            vlmprune.meter(model) if policy is None else vlmprune.prune(model, policy) as run,
        ):
            model(**turns[0], position_ids=places[..., :past], past_key_values=cache)
            dropped = [families_oracle.dropped_from(run, turns[0])]
            logits = model(**turns[1] | seen, past_key_values=cache).logits
            dropped.append(families_oracle.dropped_from(run, turns[1]))
        return logits, {layer: torch.cat([gone[layer] for gone in dropped], 1) for layer in dropped[0]}

    assert torch.equal(second(Random(0, keep=1.0))[0], second(None)[0])
    got, dropped = second(EARLY)
    with torch.no_grad(), masked(model, dropped):
        want = model(**whole, position_ids=places, use_cache=False).logits[:, past:]
    visible = ~dropped[1][:, past:]
    torch.testing.assert_close(got[visible], want[visible], rtol=0, atol=families_oracle.TOLERANCE)


def test_beams(model):
    case, even = CASES["qwen3vl"], Stages([vlmprune.Uniform(0, keep=0.6), FastV(layer=1, keep=0.7)])
    inputs, _ = prompts(case, [case.one])
    with vlmprune.prune(model, even):
        want = families_oracle.generate(model, inputs)[1]
        got = families_oracle.generate(model, inputs, num_beams=2)[1]
    torch.testing.assert_close(got[:, 0], want[:, 0].expand(2, -1), rtol=0, atol=1e-5)


def labels_for(inputs):
    real = inputs["attention_mask"].bool()
    unasked = (inputs["input_ids"] == IMAGE) | ~real | ~real.roll(1, 1)  # a row of padding has nothing to say
    return inputs["input_ids"].masked_fill(unasked, -100)


def gradients(model):
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


@pytest.mark.real("the masked run's own gradients lose the mark of the pretended device")
def test_gradients_are_the_oracles(model):
    """Those of the mergers that make the features included."""
    inputs, _ = prompts(CASES["qwen3vl"], CASES["qwen3vl"].padded)
    labels = labels_for(inputs)
    with vlmprune.prune(model.train(), EARLY) as run:
        model(**inputs, labels=labels, use_cache=False).loss.backward()
    got = gradients(model)
    with masked(model, families_oracle.dropped_from(run, inputs)):
        model(**inputs, labels=labels, use_cache=False).loss.backward()
    want = gradients(model.eval())
    assert got.keys() == want.keys() and sum("deepstack" in name for name in got) > 4
    for name, grad in got.items():
        torch.testing.assert_close(grad, want[name], rtol=1e-3, atol=1e-3 * want[name].abs().max().item())


@pytest.mark.parametrize("reentrant, frozen", [(False, False), (False, True), (True, True)])
@pytest.mark.real("torch.utils.checkpoint asks for its random state")
def test_gradient_checkpointing_changes_no_bit(reentrant, frozen):
    model = build(CASES["qwen3vl"]).train()
    inputs, _ = prompts(CASES["qwen3vl"], CASES["qwen3vl"].padded)
    labels, grads = labels_for(inputs), []
    model.model.visual.requires_grad_(not frozen)
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        if frozen:
            model.model.visual.requires_grad_(False)
        with vlmprune.prune(model, EARLY):
            model(**inputs, labels=labels, use_cache=False).loss.backward()
        grads.append(gradients(model))
    assert grads[0].keys() == grads[1].keys() and any("deepstack" in name for name in grads[0]) != frozen
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])


@pytest.mark.real("torch.utils.checkpoint asks for its random state")
def test_features_in_training_and_reentrant_checkpoints():
    model = build(CASES["qwen3vl"]).train()
    inputs, _ = prompts(CASES["qwen3vl"], [CASES["qwen3vl"].one])
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    message = r"^gradient checkpointing: expected use_reentrant=False with stages at or before .*, got True"
    with pytest.raises(ModelError, match=message), vlmprune.prune(model, EARLY):
        model(**inputs, labels=labels_for(inputs), use_cache=False)
    with vlmprune.prune(model, FastV(layer=3)):
        model(**inputs, labels=labels_for(inputs), use_cache=False).loss.backward()


def test_as_many_features_as_layers():
    config = CASES["qwen3vl"].config()
    config.text_config.num_hidden_layers = 2
    config.text_config.layer_types = ["full_attention"] * 2
    model = placed(hf.AutoModelForImageTextToText.from_config(config).eval())
    inputs, _ = prompts(CASES["qwen3vl"], [CASES["qwen3vl"].one])
    message = r"^deepstack_visual_indexes: expected fewer than the 2 decoder layers, got 2$"
    with torch.no_grad(), pytest.raises(ModelError, match=message), vlmprune.prune(model, Random(1)):
        model(**inputs)


@pytest.mark.real("the guard's methods would be noted twice")
def test_no_host_read_is_added(model):
    inputs, _ = prompts(CASES["qwen3vl"], [CASES["qwen3vl"].one])
    inputs.pop("attention_mask")
    index = torch.arange(3)[None].to(model.device)
    with torch.no_grad():
        with HostReads(model.device, (plain := []).append):
            model(**inputs)
        with vlmprune.prune(model, Custom(0, lambda ctx: index)):
            model(**inputs)  # the first choice is checked
            with HostReads(model.device, (pruned := []).append):
                model(**inputs)
    assert len(pruned) <= len(plain)


@pytest.mark.cpu("is accelerate's main device here")
def test_on_accelerates_devices(model):
    accelerate = pytest.importorskip("accelerate")
    inputs, _ = prompts(CASES["qwen3vl"], CASES["qwen3vl"].padded)
    with vlmprune.prune(model, EARLY):
        want = families_oracle.generate(model, inputs)[1]
    offloaded = build(CASES["qwen3vl"])
    accelerate.cpu_offload(offloaded, execution_device="cpu")
    with vlmprune.prune(offloaded, EARLY):
        assert torch.equal(families_oracle.generate(offloaded, inputs)[1], want)


@pytest.mark.cpu("is accelerate's main device here")
def test_layers_on_two_devices():
    """Layers 1.. live on "meta", which computes shapes and refuses to mix with the CPU: there the features are first."""
    hooks = pytest.importorskip("accelerate.hooks")
    model, (inputs, _) = build(CASES["qwen3vl"]), prompts(CASES["qwen3vl"], CASES["qwen3vl"].padded)
    text = model.model.language_model
    for block in [*text.layers[1:], text.norm, model.lm_head]:
        block.to("meta")
        for module in block.modules():
            hooks.add_hook_to_module(module, hooks.AlignDevicesHook(execution_device="meta"))
    with torch.no_grad(), vlmprune.prune(model, Stages([Random(0, keep=0.6), Random(2, keep=0.6)])) as run:
        out = model(**inputs, use_cache=True)
    assert [stage.index.device.type for stage in run.stages] == ["cpu", "meta"]
    assert out.logits.shape[:2] == inputs["input_ids"].shape
