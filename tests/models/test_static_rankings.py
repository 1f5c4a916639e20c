"""Static rankings: a prompt like one before it is pruned without its policy being asked, and gets what it would have got."""

import gc
import weakref
from dataclasses import dataclass

import pytest
import torch
from transformers import DynamicCache

import vlmprune
from helpers.tiny import make_batch, make_model
from vlmprune import ops
from vlmprune.models import plans as kept_plans
from vlmprune.models.host.parts import find_parts
from vlmprune.models.scope import find_engine
from vlmprune.policies import PruningPolicy, Ranking, ranked

BATCHES = {
    "one": [[4, "I", 7]],
    "padded-2-1-0-images": [[4, "I", 3, "I", 7], ["I", 5], [6]],
}
STATIC = {
    vlmprune.FastV(layer=2, keep=0.4): 1,
    vlmprune.FastV(layer=2, keep=5, rows="mean"): 1,
    vlmprune.FastV(layer=2, keep=5, spend="image"): 1,
    vlmprune.Feather(layers=(2, 4), keep=0.5): 2,
    vlmprune.PyramidDrop(layers=(1, 3), positions="pack"): 2,
    vlmprune.Uniform(layer=2, keep=0.3): 1,
    vlmprune.Random(layer=2, keep=0.3): 1,
    vlmprune.Stages([vlmprune.Uniform(layer=1, keep=0.6), vlmprune.FastV(layer=3, keep=0.5)]): 2,
}
"""Policies, and at how many stages they are static."""


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture
def asked(monkeypatch):
    """Layers at which a policy was asked."""
    layers = []
    for kind in (
        vlmprune.FastV,
        vlmprune.Feather,
        vlmprune.PyramidDrop,
        vlmprune.Uniform,
        vlmprune.Random,
        Mine,
    ):
        rank = kind.rank

        def noted(self, ctx, rank=rank):
            layers.append(ctx.layer)
            return rank(self, ctx)

        monkeypatch.setattr(kind, "rank", noted)
    return layers


@dataclass(frozen=True)
class Mine(PruningPolicy):
    """Of somebody else; ``how`` says what its ranking is made of."""

    layer: int = 2
    keep: float = 0.5
    how: str = "read"

    def needs(self, layer):
        return vlmprune.Needs(attention="previous")

    def rank(self, ctx):
        seen = ctx.given("attention")
        if self.how == "made anew":
            return ranked(ctx, self, seen.rating(seen.last.clone()), static=True)
        if self.how == "by numbers":
            return Ranking(seen.rating(seen.last), tuple(map(len, ctx.images())), static=True)
        return ranked(ctx, self, seen.rating(seen.last), static=self.how == "read")


def run_twice(model, policy, batches):
    """What is kept of each of some prompts of one kind, once their plan is there."""
    with torch.no_grad(), ops.use_backend("triton"), vlmprune.prune(model, policy) as run:
        for _ in range(2):
            model(**batches[0])
        out = []
        for batch in batches:
            logits = model(**batch).logits
            out.append(([stage.index for stage in run.stages], logits, run.report().paths))
    return out


@pytest.mark.parametrize(
    "policy, specs",
    [
        *((policy, "one") for policy in STATIC),
        *((policy, "padded-2-1-0-images") for policy in [*STATIC][2:5]),
    ],
    ids=str,
)
def test_other_prompts_get_their_own(model, asked, policy, specs):
    batches = [make_batch(BATCHES[specs], seed=seed) for seed in range(2)]
    with torch.no_grad(), vlmprune.prune(model, policy) as run:
        truth = []
        for batch in batches:
            logits = model(**batch).logits
            truth.append(([stage.index for stage in run.stages], logits))
    asked.clear()
    found = run_twice(model, policy, batches)
    stages = len(policy.layers)
    again = asked[2 * stages :]  # by two prompts of a kind that has come twice
    if isinstance(policy, vlmprune.Feather):
        assert 2 not in again  # how many enter the second stage differs: the union with a grid is data
    else:
        assert len(again) == (stages - STATIC[policy]) * 2
    for (index, logits, paths), (want, right) in zip(found, truth, strict=True):
        assert all(map(torch.equal, index, want)) and paths == ("one pass (triton)",) * stages
        torch.testing.assert_close(logits, right, atol=1e-4, rtol=0)


def test_another_kind_of_prompt_is_asked_for(model, asked, monkeypatch):
    """Other counts, another grid of as many tokens, another dtype, another backend: never what was for another."""
    policy = vlmprune.FastV(layer=2, keep=0.4)
    with torch.no_grad(), ops.use_backend("triton"), vlmprune.prune(model, policy):
        for _ in range(2):
            model(**make_batch([[4, "I", 7]]))
        asked.clear()
        model(**make_batch([[3, "I", 8]]))  # as long, and the image elsewhere
        assert not asked
        for specs in ([[4, "I", 8]], [[4, "I", 7]] * 2, [[4, "I", 3, "I", 7]]):
            model(**make_batch(specs))
            assert asked == [2]
            asked.clear()
        with ops.use_backend("reference"):
            model(**make_batch([[4, "I", 7]]))
        assert asked == [2]
        attn = model.model.language_model.layers[1].self_attn
        monkeypatch.setattr(attn, "scaling", 2 * attn.scaling)  # a setting of the plan, though no shape
        model(**make_batch([[4, "I", 7]]))
        assert asked == [2, 2]


@pytest.mark.parametrize("how, times", [("read", 0), ("made anew", 3), ("not static", 3), ("by numbers", 0)])
def test_a_foreign_policy_says_so_itself(model, asked, how, times):
    batches = [make_batch(BATCHES["one"], seed=seed) for seed in range(3)]
    found = run_twice(model, Mine(how=how), batches)
    assert len(asked) - 2 == times
    asked.clear()
    with torch.no_grad(), vlmprune.prune(model, Mine(how=how)) as run:
        for batch, (index, *_) in zip(batches, found, strict=True):
            model(**batch)
            assert torch.equal(run.stages[0].index, index[0])


def test_it_keeps_nothing_of_a_prompt(model):
    """Neither its keys nor its rows: a static ranking outlives it."""
    with torch.no_grad(), ops.use_backend("triton"), vlmprune.prune(model, vlmprune.FastV(layer=2)):
        for _ in range(3):
            cache = DynamicCache()
            out = model(**make_batch(BATCHES["one"]), past_key_values=cache)
            gone = [weakref.ref(x) for x in (cache, cache.layers[1].keys, out.logits)]
            del cache, out
            gc.collect()
            assert [x() for x in gone] == [None, None, None]


def test_one_whose_plan_is_gone_is_asked_for(model, asked, monkeypatch):
    monkeypatch.setattr(kept_plans, "PLANS", 1)
    first, other = make_batch([[4, "I", 7]]), make_batch([[4, "I", 8]])
    with torch.no_grad(), ops.use_backend("triton"), vlmprune.prune(model, vlmprune.FastV(layer=2)) as run:
        for _ in range(2):
            model(**first)
        kept = run.stages[0].index
        for _ in range(2):
            model(**other)
        asked.clear()
        model(**first)
        assert asked == [2] and torch.equal(run.stages[0].index, kept)


def test_how_many_are_remembered_is_bounded(model, monkeypatch):
    monkeypatch.setattr("vlmprune.models.fused.PLANS", 2)
    with torch.no_grad(), ops.use_backend("triton"), vlmprune.prune(model, vlmprune.FastV(layer=2)):
        passes = find_engine(find_parts(model)).stage.passes
        for text in (7, 8, 9, 10):
            for _ in range(2):
                model(**make_batch([[4, "I", text]]))
            assert 1 <= len(passes._static) <= 2


def test_labels_keep_the_rows_that_predict_them(model):
    """In training the pass does not run, whatever is remembered."""
    batch = make_batch([[4, "I"], [2, "I", 9]])
    with ops.use_backend("triton"), vlmprune.prune(model, vlmprune.FastV(layer=2)) as run:
        for _ in range(3):
            with torch.no_grad():
                model(**batch)
        model(**batch, labels=batch["input_ids"])
        assert "in training" in run.report().paths[0]
