"""Every built-in method through the wiring: batches, padding, several images, two turns of padding sides, the oracle."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

import vlmprune
from helpers.methods import shuffled
from helpers.scorers import glance
from helpers.tiny import IMAGE, dropped_from, generate, make_batch, make_model, oracle, slow
from helpers.waves import sets_of, waves_oracle
from vlmprune.models.graphs.reads import HostReads
from vlmprune.policies.base import Needs, PruningPolicy, Ranking, Reduction, TokenContext
from vlmprune.policies.registry import BUILT_IN

STEPS = 3
BATCHES = {
    "one": [[4, "I", 7]],
    "padded-2-1-0-images": [["I", 9, "I", 4], [3, "I", 5], [12]],
}
# Settings that fit 16 visual tokens an image and 6 decoder layers. A method without a row here fails the first test.
METHODS = {
    "fastv": [dict(layer=2, keep=0.4), dict(layer=3, keep=6, rows="mean")],
    "feather": [dict(layers=(2, 4), keep=0.5)],
    "pyramiddrop": [dict(layers=(2, 4)), dict(layers=(1, 3, 5), positions="pack")],
    "sparsevlm": [
        dict(layers=(2, 4), keep=(9, 4)),
        dict(layers=(2, 4), keep=(9, 4), merge="sum", positions="pack"),
        dict(layers=(2, 4), keep=(0.5, 0.5), recycle=False),
        dict(layers=(2, 4), version="1.0", tokens=128, scale=2.0),
        dict(layers=(2, 4), version="paper"),
    ],
    "sparsevlm_plus": [dict(layers=(2, 4), keep=(9, 4), heads=3)],
    "dart": [
        dict(layer=2, keep=8, pivots=(2, 2), count="exact"),
        dict(layer=3, keep=6, pivots=(1, 3)),
        dict(layer=0, keep=8, pivots=(2, 2), count="exact", order="norm"),
    ],
    "knorm": [dict(layer=2, keep=0.4), dict(layer=3, keep=6)],
    "greedyprune": [dict(layer=2, keep=6, tau=0.8)],
    "v2drop": [dict(layers=(2, 4), keep=(0.5, 3)), dict(layers=(1,), keep=(6,))],
    "priortr": [dict(layer=2, keep=6), dict(layer=3, keep=0.4, rows="last", heads="max", null=1)],
    "fitprune": [dict(layers=(1, 2, 4), drop=(2, 0.3, 4)), dict(layers=(3,), drop=8)],
    "mustdrop": [
        dict(layers=(2, 4), keep=(9, 4)),
        dict(layers=(2, 4), keep=0.5, positions="pack"),
        dict(layers=(2, 4), global_thr=0.05, individual_thr=0.05),
    ],
    "ficoco": [dict(layers=(2, 4), drop=4)],
    "vscan": [dict(keep=8, then=4, layer=3, window=2, shallow_layer=1)],
    "star": [dict(keep=8, then=4, layer=3)],
    "vtw": [dict(layer=3), dict(layer=2, positions="pack")],
    "lvlm_csp": [dict(cluster=5, then=6, scatter=2, prune=4)],
    "fastervlm": [dict(keep=6), dict(keep=0.5, positions="pack")],
    "visionzip": [dict(dominant=5, contextual=2), dict(dominant=5, contextual=2, positions="pack")],
    "vispruner": [dict(keep=6), dict(keep=6, positions="pack")],
    "folder": [dict(keep=6), dict(keep=6, place="projected", positions="pack")],
    "aim": [
        dict(keep=9, layer=2, stages=2),
        dict(keep=9, features="keys", layer=3, stages=1, last=0.4, positions="pack"),
    ],
    "divprune": [dict(keep=6), dict(keep=6, positions="pack")],
    "cdpruner": [dict(keep=6), dict(keep=6, relevance="none", positions="pack")],
    "scope": [dict(keep=6), dict(keep=6, spend="prompt", positions="pack")],
    "mmtok": [dict(keep=6), dict(keep=6, positions="pack")],
    "prunesid": [dict(keep=9), dict(keep=6, positions="pack")],
    "zoo_prune": [dict(keep=6), dict(keep=6, directions=5, step=1, positions="pack")],
    "agilepruner": [dict(keep=6, average=2.0), dict(keep=6, average=0.5, positions="pack")],
    "prumerge": [
        dict(keep=7),
        dict(keep=7, plus=True, neighbours=4, positions="pack"),
        dict(keep=0.9, adaptive=True),
    ],
    "trim": [dict(keep=6), dict(keep=6, positions="pack"), dict(keep=0.9, adaptive=True)],
    "flowcut": [dict(keep=6, vision_layers=(0, 1)), dict(keep=6, vision_layers=(0,), positions="pack")],
    "tome": [dict(keep=6), dict(keep=6, rounds=3, positions="pack")],
    "visiontrim": [dict(keep=8), dict(keep=8, score="received", positions="pack")],
    "hired": [dict(keep=6), dict(keep=0.4, content="runs", positions="pack")],
    "globalcom2": [dict(keep=6), dict(keep=0.4, positions="pack")],
    "holov": [dict(keep=6, runs=4), dict(keep=6, runs=None, positions="pack")],
    "hiprune": [dict(keep=7, alpha=0.9, object_layer=1), dict(keep=6, object_layer=1, positions="pack")],
    "evs": [dict(keep=6), dict(keep=0.4, positions="pack")],
    "vidcom2": [dict(keep=6), dict(keep=0.4, positions="pack")],
    "dycoke": [dict(keep=6), dict(keep=0.4, positions="pack")],
    "fastvid": [dict(keep=6), dict(keep=0.4, context=0.8, own=0.0, positions="pack")],
    "flashvid": [
        dict(keep=9, then=4, layer=3),
        dict(keep=0.6, then=0.5, layer=2, divide="links", positions="pack"),
    ],
    "prunevid": [dict(layer=3), dict(keep=9, then=0.5, layer=2, positions="pack")],
    "holitom": [dict(keep=9, then=4, layer=3), dict(keep=0.6, then=0.5, layer=2, positions="pack")],
    "accm_selection": [
        dict(keep=7),
        dict(keep=6, nearest=False, vision_layer=-1, heads="joined", overflow="last", order="selected"),
        dict(keep=6, relevance="none", order="selected", positions="pack"),
    ],
    "learned": [dict(scorer=glance(64, layer=3), layer=3, keep=6)],
    "sgl": [dict(guide=shuffled, layer=3, keep=0.4)],
    "scout": [dict(coarse=vlmprune.Uniform(layer=0, keep=4), fine=3, look=3)],
    "random_deep": [dict(layer=4, keep=0.5)],
    "random": [dict(layer=0, keep=0.3)],
    "uniform": [dict(layer=1, keep=0.25), dict(layer=1, keep=None, stride=2)],
}
MADE = {f"{name}-{i}": (name, row) for name, rows in METHODS.items() for i, row in enumerate(rows)}
READS_THE_DEVICE = {
    "feather-0": "the union's width",
    "uniform-1": "the grid's width",
    "sparsevlm-3": "the rank",
    "sparsevlm-4": "the rank",
    "mustdrop-2": "how many pass the thresholds",
    "prumerge-2": "the outliers' number",
    "trim-2": "the outliers' number",
    "prunevid-0": "the clusters' number",
}


def make(name: str) -> PruningPolicy:
    method, settings = MADE[name]
    return BUILT_IN[method](**settings)


def reads_the_tower(name: str) -> bool:
    policy = make(name)
    return any(policy.needs(layer).vision for layer in policy.layers)


# Another tower is another case for who reads it; the others meet other features, which one of them tries.
BY_TOWER = pytest.mark.parametrize(
    "model, name",
    [("clip", name) for name in MADE]
    + [("siglip", name) for name in MADE if name == "fastv-0" or reads_the_tower(name)],
    indirect=["model"],
)


@dataclass(frozen=True)
class Heard(PruningPolicy):
    """Another policy, and what it answered at each stage."""

    inner: PruningPolicy
    said: dict = field(default_factory=dict, hash=False)

    @property
    def layers(self) -> tuple[int, ...]:
        return self.inner.layers

    def needs(self, layer: int) -> Needs:
        return self.inner.needs(layer)

    def ranks(self, layer: int) -> bool:
        return self.inner.ranks(layer)

    def empties(self, layer: int) -> bool:
        return self.inner.empties(layer)

    def rank(self, ctx: TokenContext) -> Ranking:
        self.select(ctx)
        return self.inner.rank(ctx)

    def select(self, ctx: TokenContext) -> Tensor | Reduction:
        choice = self.inner.select(ctx)
        if isinstance(choice, Reduction):
            self.said[ctx.layer] = (choice.index, choice.hidden, ctx, choice.positions)
        else:
            self.said[ctx.layer] = (choice, None, ctx, "keep")
        return choice


def changes(said: tuple) -> bool:
    """Whether a stage did more than drop tokens: merged them, packed their positions or put them in another order."""
    index, hidden, _, positions = said
    listed = [[i for i in row if i >= 0] for row in index.tolist()]
    return hidden is not None or positions == "pack" or any(row != sorted(row) for row in listed)


def test_every_built_in_method_has_a_row():
    assert list(METHODS) == [
        name for name in BUILT_IN if name != "accm"
    ]  # whose texts are no tokens: test_accm.py


@pytest.fixture(scope="module", params=["clip", "siglip"])
def model(request):
    return make_model(tower=request.param)


@pytest.mark.parametrize("specs", BATCHES.values(), ids=BATCHES)
@BY_TOWER
def test_equals_the_oracle(model, name, specs):
    policy, batch = Heard(make(name)), make_batch(specs)
    with vlmprune.prune(model, policy) as run:
        tokens, logits, _ = generate(model, batch, STEPS)
    assert run.stages[-1].tokens_kept < (batch["input_ids"] == IMAGE).sum(1).max()
    waves = [layer for layer in policy.layers if policy.needs(layer).wave]
    if waves:
        want_tokens, want_logits = waves_oracle(model, batch, waves[0], sets_of(run), STEPS, (IMAGE,))
    else:
        want_tokens, want_logits = slow(model, batch, policy.said, STEPS)
    torch.testing.assert_close(logits, want_logits, atol=1e-4, rtol=0)
    assert torch.equal(tokens, want_tokens)
    restores = any(policy.needs(layer).restored for layer in policy.layers)
    if not restores and not any(
        map(changes, policy.said.values())
    ):  # then the plain masking oracle must agree
        plain_tokens, plain_logits, _ = oracle(model, batch, dropped_from(run, batch), STEPS)
        torch.testing.assert_close(logits, plain_logits, atol=1e-4, rtol=0)
        assert torch.equal(tokens, plain_tokens)


@BY_TOWER
def test_a_sample_in_a_padded_batch_keeps_what_it_keeps_alone(model, name):
    """Neither padding nor neighbours change a choice."""
    alone = make_batch([[3, "I", 5]])
    both = {k: v.clone() for k, v in make_batch([["I", 9, "I", 4], [3, "I", 5]]).items()}
    n = alone["input_ids"].shape[1]
    both["input_ids"][1, -n:] = alone["input_ids"][0]
    both["pixel_values"][2] = alone["pixel_values"][0]
    if name.startswith("random"):
        pytest.skip("a draw belongs to a place in the batch")
    policy = make(name)
    with torch.no_grad(), vlmprune.prune(model, policy) as run:
        model(**alone)
        want = [run.kept_at(i, 0).tolist() for i in range(len(run.stages))]
        positions = (both["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        model(**both, position_ids=positions)
        got = [run.kept_at(i, 1).tolist() for i in range(len(run.stages))]
    assert got == want


@BY_TOWER
def test_runs_in_bfloat16(model, name):
    """As checkpoints are stored: policies compute in float32 what they hand back to layers that do not."""
    batch, policy = make_batch(BATCHES["padded-2-1-0-images"]), make(name)
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    half = copy.deepcopy(model).bfloat16()
    with vlmprune.prune(half, policy) as run:
        _, logits, _ = generate(half, batch, 1)
    assert logits.isfinite().all()
    for stage in () if name in READS_THE_DEVICE else run.stages:
        told = [policy.kept(n, m, stage.layer) for n, m in zip(stage.entered, (2, 1, 0), strict=True)]
        assert list(stage.kept) == told


@pytest.fixture(scope="module")
def text_only(model):
    """A batch without a picture, and the unpruned model's logits."""
    batch = make_batch([[12], [5]])
    return batch, generate(model, batch, STEPS)[1]


@pytest.mark.parametrize("model", ["clip"], indirect=True)
@pytest.mark.parametrize("name", MADE)
def test_text_only_is_a_no_op(model, text_only, name):
    batch, logits = text_only
    with vlmprune.prune(model, make(name)) as run:
        assert torch.equal(generate(model, batch, STEPS)[1], logits)
    assert run.stages == []


@BY_TOWER
@pytest.mark.real("the guard's methods would be noted twice")
def test_fixed_counts_read_nothing_back(model, name):
    """The whole prefill of an unpadded prompt under a guard: our hooks add no read to those of transformers itself."""
    if name in READS_THE_DEVICE:
        pytest.skip(f"documented: {READS_THE_DEVICE[name]} is data")
    batch = make_batch(BATCHES["one"])
    batch.pop("attention_mask")
    policy = make(name)
    with torch.no_grad():
        with HostReads(model.device, (plain := []).append):
            model(**batch)
        with vlmprune.prune(model, policy):
            model(**batch)  # the first choice at each layer is read back, to be checked
            with HostReads(model.device, (pruned := []).append):
                model(**batch)
    text = any(policy.needs(k).reads_text for k in policy.layers)
    extra = len(pruned) - len(plain)
    draws = isinstance(policy, vlmprune.Random)
    # Where the text lies is data, read once a prefill. Random's one list comes from its own generator on the host.
    assert extra <= (1 if text or draws else 0), pruned


def test_the_guard_can_fail(model):
    batch = make_batch(BATCHES["one"])
    batch.pop("attention_mask")
    with torch.no_grad():
        with HostReads(model.device, (plain := []).append):
            model(**batch)
        with (
            HostReads(model.device, (pruned := []).append),
            vlmprune.prune(model, vlmprune.Feather(layers=(1, 2))),
        ):
            model(**batch)
    assert len(pruned) > len(plain)


@pytest.mark.real("the guard's methods would be noted twice")
def test_without_sinks(model):
    """A ranking whose scores are changed runs in one pass, keeps other tokens, and reads nothing back."""
    plain, batch = vlmprune.FastV(layer=2, keep=0.4), make_batch(BATCHES["padded-2-1-0-images"])
    heard, kept = Heard(vlmprune.WithoutSinks(plain, tau=2.5)), []
    for policy in (plain, heard):
        with vlmprune.prune(model, policy) as run:
            tokens, logits, _ = generate(model, batch, STEPS)
            kept.append(run.kept().tolist())
    assert kept[0] != kept[1] and len(kept[0]) == len(kept[1])
    assert run.report().paths[0].startswith("one pass")
    want_tokens, want_logits = slow(model, batch, heard.said, STEPS)
    torch.testing.assert_close(logits, want_logits, atol=1e-4, rtol=0)
    assert torch.equal(tokens, want_tokens)
    one = make_batch(BATCHES["one"])
    one.pop("attention_mask")
    with torch.no_grad(), HostReads(model.device, (unpruned := []).append):
        model(**one)
    with torch.no_grad(), vlmprune.prune(model, heard.inner):
        model(**one)
        with HostReads(model.device, (pruned := []).append):
            model(**one)
    assert len(pruned) <= len(unpruned), pruned


def test_two_phases_and_intersection(model):
    """A method before the language model and one inside it, as one policy."""
    two = vlmprune.Stages([vlmprune.FasterVLM(keep=8), vlmprune.FastV(layer=3, keep=0.5)])
    both = vlmprune.FastV(layer=2, keep=0.6) & vlmprune.Uniform(layer=2, keep=0.6)
    for policy in (two, both):
        heard, batch = Heard(policy), make_batch(BATCHES["padded-2-1-0-images"])
        with vlmprune.prune(model, heard):
            tokens, logits, _ = generate(model, batch, STEPS)
        want_tokens, want_logits = slow(model, batch, heard.said, STEPS)
        torch.testing.assert_close(logits, want_logits, atol=1e-4, rtol=0)
        assert torch.equal(tokens, want_tokens)
