"""Stages as one fused pass: what a prefill adds, the same choice as by the ops one by one, plans, and why not."""

import copy
import warnings
from collections import Counter
from dataclasses import dataclass, replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import vlmprune
from helpers.tiny import IMAGE, TOLERANCE, dropped_from, generate, make_batch, make_model, oracle
from vlmprune import ops
from vlmprune.models import plans as kept_plans
from vlmprune.models.host.parts import find_parts
from vlmprune.models.scope import find_engine
from vlmprune.ops.scoring import Scoring
from vlmprune.policies import PruningPolicy, Ranking, TokenContext, quotas
from vlmprune.policies.inputs import Rating

VIEWS = {"view", "expand", "unsqueeze", "slice", "select", "t", "transpose", "detach", "alias", "split"}
VIEWS |= {"_unsafe_view", "squeeze", "permute", "as_strided", "unbind"}
BATCHES = {
    "one": [[4, "I", 7]],
    "two-images": [[4, "I", 3, "I", 7]],
    "padded-2-1-0-images": [[4, "I", 3, "I", 7], ["I", 5], [6]],
    "equal": [["I", 5], ["I", 5]],
    "ends-with-its-image": [[4, "I"], [2, "I", 9]],
}
RANKING = [
    vlmprune.FastV(layer=2, keep=0.4),
    vlmprune.FastV(layer=2, keep=5, rows="mean"),
    vlmprune.FastV(layer=2, keep=5, spend="image"),
    vlmprune.Feather(layers=(2, 4), keep=0.5),
    vlmprune.PyramidDrop(layers=(1, 2, 4), positions="pack"),
    vlmprune.PyramidDrop(layers=(1, 3), positions="keep"),
    vlmprune.FasterVLM(keep=6, positions="pack"),
    vlmprune.FasterVLM(keep=6, spend="prompt", positions="keep"),
    vlmprune.SparseVLM(layers=(2, 4), keep=(8, 4), recycle=False, positions="pack"),
    vlmprune.SparseVLMPlus(layers=(2, 4), keep=(8, 4), heads=2),
    vlmprune.VScan(keep=9, then=4, layer=3, shallow_layer=0, window=2, positions="pack"),
    vlmprune.Uniform(layer=2, keep=0.3),
    vlmprune.Uniform(layer=0, keep=5, order="raster"),
    vlmprune.Uniform(layer=2, stride=3),
    vlmprune.Random(layer=2, keep=0.3),
    vlmprune.Stages([vlmprune.Uniform(layer=1, keep=0.6), vlmprune.FastV(layer=3, keep=0.5)]),
    vlmprune.Stages(
        [vlmprune.Random(layer=0, keep=0.6), vlmprune.Feather(layers=(2, 4), keep=0.7, stride=2)]
    ),
]


@pytest.fixture(scope="module")
def model():
    return make_model()


@dataclass(frozen=True)
class Apart(PruningPolicy):
    """A policy along the general road: its choice comes from ``select``, and separate ops carry it out."""

    policy: PruningPolicy

    @property
    def layers(self):
        return self.policy.layers

    def needs(self, layer):
        return self.policy.needs(layer)

    def select(self, ctx):
        return self.policy.select(ctx)


class Ops(TorchDispatchMode):
    """Counts the operations that are no views; an op of ours is one, whatever the reference does inside."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        space, name = str(func).split(".")[:2]
        if space == "aten" and name in VIEWS:
            return func(*args, **(kwargs or {}))
        self.count[f"{space}.{name}"] += 1
        if space != "vlmprune":
            return func(*args, **(kwargs or {}))
        with _disable_current_modes():
            return func(*args, **(kwargs or {}))


def added(model, batch, policy):
    """What a pruned prefill does beyond an unpruned one, once the shapes have come before."""
    counts = []
    with torch.no_grad():
        for scope in (vlmprune.meter(model), vlmprune.prune(model, policy)):
            with scope:
                model(**batch), model(**batch)
                with Ops() as seen:
                    model(**batch)
            counts.append(seen.count)
    counts[1].subtract(counts[0])
    return +counts[1]


@pytest.mark.parametrize(
    "policy, most",
    [
        (vlmprune.FastV(layer=2, keep=0.5), 16),
        (vlmprune.Feather(layers=(2, 4), keep=0.5), 28),
        (vlmprune.FasterVLM(keep=8, positions="pack"), 16),
        (vlmprune.Uniform(layer=2, keep=0.5), 8),
        (vlmprune.Random(layer=2, keep=0.5), 8),
    ],
    ids=lambda x: type(x).__name__,
)
@pytest.mark.parametrize("specs", ["one", "two-images"])
@pytest.mark.real("counts operations, and marks none inside ours")
def test_what_a_prefill_adds(model, policy, most, specs):
    more = added(model, make_batch(BATCHES[specs]), policy)
    assert 0 < sum(more.values()) <= most, more
    fused_op = {"vlmprune.prune_tokens", "vlmprune.prune_scored"} & more.keys()
    assert sum(more[op] for op in fused_op) == len(policy.layers)
    # nothing is built on the host, or copied from there; the one new tensor takes the rows back at the end
    built = {"lift_fresh", "_to_copy", "arange", "full", "zeros", "ones", "empty", "scalar_tensor", "rand"}
    assert not {f"aten.{name}" for name in built} & more.keys(), more
    assert more["aten.new_full"] == 1


@pytest.mark.real("counts operations, and marks none inside ours")
def test_weights_of_pairs_and_the_choice_of_heads_are_part_of_the_pass(model):
    """SparseVLM+ finds out who rates, and what RoPE alone would pay; all else is one op a stage."""
    more = added(
        model, make_batch(BATCHES["one"]), vlmprune.SparseVLMPlus(heads=2, layers=(2, 4), keep=(8, 4))
    )
    assert more["vlmprune.prune_tokens"] == 2
    scored = {"received_attention", "row_lse", "prune_scored"}
    assert not {f"vlmprune.{name}" for name in scored} & more.keys(), more


@pytest.mark.parametrize("specs", BATCHES)
@pytest.mark.parametrize("policy", RANKING, ids=repr)
def test_one_pass_keeps_what_the_ops_keep_one_by_one(model, policy, specs):
    batch, seen = make_batch(BATCHES[specs]), []
    for one in (policy, Apart(policy)):
        with torch.no_grad(), vlmprune.prune(model, one) as run:
            logits = model(**batch, logits_to_keep=1).logits
        seen.append((run, logits))
    (run, logits), (apart, want) = seen
    passes = ["one pass" if policy.ranks(layer) else "chooses by itself" for layer in policy.layers]
    assert all(word in path for word, path in zip(passes, run.report().paths, strict=True))
    assert all("chooses by itself" in path for path in apart.report().paths)
    ends = (
        specs == "ends-with-its-image"
    )  # there the newest row takes another's place: the last one's, or the worst one's
    for stage, other in zip(run.stages, apart.stages, strict=True):
        assert (stage.entered, stage.kept) == (other.entered, other.kept)
        if not ends:
            assert torch.equal(stage.index, other.index) and torch.equal(stage.ordinals, other.ordinals)
    if not ends:
        torch.testing.assert_close(logits, want, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("policy", RANKING[:5] + RANKING[11:12], ids=repr)
def test_the_row_that_generation_goes_on_from_stays(model, policy):
    """A prompt that ends with its image, beside one that does not: as the oracle, and within the budget."""
    batch = make_batch(BATCHES["ends-with-its-image"])
    with vlmprune.prune(model, policy) as run:
        tokens, logits, _ = generate(model, batch, 3)
    ends = int((batch["input_ids"][0] == IMAGE).nonzero().max())
    assert all(ends in stage.index[0].tolist() for stage in run.stages)
    if "pack" not in repr(policy):
        want = oracle(model, batch, dropped_from(run, batch), 3)
        assert torch.equal(tokens, want[0])
        torch.testing.assert_close(logits, want[1], atol=TOLERANCE, rtol=0)


def test_the_newest_row_takes_the_place_of_the_worst():
    scores, columns = torch.tensor([[0.9, 0.8, 0.7, 0.1]]), torch.tensor([[0, 2, 3, 4]])
    out = ops.prune_scored(scores, [torch.arange(5)[None]], columns=columns, keep=2, newest=True)
    assert out.kept.tolist() == [[0, 3]] and out.tensors[0].tolist() == [[0, 1, 4]]


@pytest.mark.parametrize("specs", ["one", "padded-2-1-0-images", "two-images"])
@pytest.mark.parametrize("policy", [RANKING[0], RANKING[2], RANKING[3], RANKING[4], RANKING[6]], ids=repr)
def test_kernels_and_plans_keep_the_same(model, policy, specs):
    """In the interpreter: first as ops, then a plan is made, then it is used again."""
    batch = make_batch(BATCHES[specs])
    with torch.no_grad(), vlmprune.prune(model, policy) as run:
        want, stages = model(**batch).logits, run.stages
    with torch.no_grad(), ops.use_backend("triton"), vlmprune.prune(model, policy) as run:
        for _ in range(3):
            logits = model(**batch).logits
            assert all(torch.equal(a.index, b.index) for a, b in zip(run.stages, stages, strict=True))
            torch.testing.assert_close(logits, want, atol=TOLERANCE, rtol=0)
        assert run.report().paths == ("one pass (triton)",) * len(policy.layers)


def test_a_plan_is_made_once_and_forgotten_in_time(model, monkeypatch):
    made, policy = [], vlmprune.Uniform(layer=2, keep=3)
    build = ops.ScoredPlan.__init__
    monkeypatch.setattr(ops.ScoredPlan, "__init__", lambda *a, **k: (made.append(1), build(*a, **k))[1])
    monkeypatch.setattr(kept_plans, "PLANS", 2)
    batches = [make_batch([[n, "I", 7]]) for n in (2, 3, 4)]
    with torch.no_grad(), ops.use_backend("triton"), vlmprune.prune(model, policy):
        for batch in batches[:2]:
            model(**batch)
        assert not made  # a shape that comes once is worth none
        for _ in range(3):
            model(**batches[1])
        assert len(made) == 1
        for batch in (batches[0], batches[2], batches[1]):  # two others have come since
            model(**batch)
        model(**batches[1])
        assert len(made) == 3


def test_the_workspaces_of_plans_are_bounded(model, monkeypatch):
    with (
        torch.no_grad(),
        ops.use_backend("triton"),
        vlmprune.prune(model, vlmprune.FastV(layer=2, rows="mean")),
    ):
        plans = find_engine(find_parts(model)).stage.passes.plans
        for text in (7, 8, 9):
            for _ in range(2):
                model(**make_batch([[4, "I", text]]))
        made = [known.plan for known in plans.known.values() if known.plan is not None]
        assert len(made) == 3 and all(plan.nbytes > 0 for plan in made)
        monkeypatch.setattr(kept_plans, "WORKSPACE", made[0].nbytes + made[1].nbytes)
        for _ in range(2):
            model(**make_batch([[4, "I", 10]]))
        assert plans.nbytes() <= kept_plans.WORKSPACE and plans.known


def test_what_a_run_returned_is_not_overwritten(model):
    first, other = (make_batch([[4, "I", 7]], seed=seed) for seed in (0, 1))
    with torch.no_grad(), ops.use_backend("triton"), vlmprune.prune(model, RANKING[0]) as run:
        model(**first), model(**first)
        states = model(**first, output_hidden_states=True).hidden_states
        record, before = run.stages[0], [x.clone() for x in states]
        index = record.index.clone()
        model(**other)
        assert run.stages[0] is not record and torch.equal(record.index, index)
        assert all(map(torch.equal, states, before))
        model(**first)
        assert torch.equal(run.stages[0].index, index)


def test_gradients_flow_through_the_pass(model):
    """Without labels, in eval mode: no row is needed for a loss, and the op itself is differentiable."""
    batch, grads = make_batch(BATCHES["one"]), []
    weight = model.model.language_model.layers[0].mlp.up_proj.weight
    for one in (RANKING[0], Apart(RANKING[0])):
        with vlmprune.prune(model, one) as run:
            model(**batch).logits[:, -1].sum().backward()
        grads.append(weight.grad.clone())
        model.zero_grad()
        assert ("one pass" in run.report().paths[0]) == (one is RANKING[0])
    torch.testing.assert_close(*grads, atol=1e-4, rtol=1e-4)


def test_training_and_assisted_decoding_take_the_general_road(model):
    batch = make_batch(BATCHES["one"])
    with vlmprune.prune(model, RANKING[0]) as run:
        model(**batch, labels=batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE, -100))
        assert run.report().paths == ("in training the rows that predict labels stay, whatever their score",)
        with torch.no_grad():
            model(**batch, logits_to_keep=3)
        assert run.report().paths == ("candidates of assisted decoding stand behind the prompt",)
        with torch.no_grad():
            model(**batch, logits_to_keep=1)
    (path,) = run.report().paths
    here = next(model.parameters()).device
    if here.type == "cuda":  # with --device these tests mean kernels, not the reference
        assert path == "one pass (triton)"
    else:
        assert path.startswith("one pass (reference (triton: ")
    with torch.no_grad(), vlmprune.prune(model, vlmprune.DivPrune(keep=4, positions="pack")) as run:
        model(**batch)
    assert run.report().as_dict()["paths"] == ("DivPrune chooses by itself",)


def test_a_copy_has_no_plans(model):
    policy, batch = RANKING[0], make_batch(BATCHES["one"])
    mine = copy.deepcopy(model)
    vlmprune.attach(mine, policy)
    with torch.no_grad(), ops.use_backend("triton"):
        want = [mine(**batch).logits for _ in range(2)]
        other = copy.deepcopy(mine)
        assert torch.equal(other(**batch).logits, want[0])
    vlmprune.detach(other)
    vlmprune.detach(mine)


@dataclass(frozen=True)
class Loudest(PruningPolicy):
    """A foreign method of the scoring kind: what text rows attend to in one head, and the corners in any case."""

    layer: int = 3
    keep: float = 0.25

    def needs(self, layer: int) -> vlmprune.Needs:
        return vlmprune.Needs(attention="previous", rows="text")

    def rank(self, ctx: TokenContext) -> Ranking:
        rating = ctx.given("attention").rating(head_reduce="max", row_reduce="max")
        code = torch.zeros(ctx.mask.shape, dtype=torch.int8)
        code[:, 0] = 3
        return Ranking(rating, tuple(quotas(ctx, self)), code=code, extra=(1,) * len(ctx.counts))


@pytest.mark.parametrize("specs", ["one", "padded-2-1-0-images", "equal"])
def test_a_foreign_policy_gets_the_pass_for_free(model, specs):
    batch = make_batch(BATCHES[specs])
    with vlmprune.prune(model, Loudest()) as run:
        tokens, logits, _ = generate(model, batch, 3)
    assert run.report().paths[0].startswith("one pass")
    assert all(
        0 in row.tolist() for row, n in zip(run.stages[0].ordinals, run.stages[0].entered, strict=True) if n
    )
    want = oracle(model, batch, dropped_from(run, batch), 3)
    assert torch.equal(tokens, want[0])
    torch.testing.assert_close(logits, want[1], atol=TOLERANCE, rtol=0)


def test_a_policy_may_change_its_context(model):
    """``dataclasses.replace`` of what a stage shows."""

    @dataclass(frozen=True)
    class Reversed(vlmprune.FastV):
        def select(self, ctx):
            other = replace(ctx.attention, scale=-ctx.attention.scale)
            return vlmprune.FastV.select(self, replace(ctx, attention=other))

    batch, seen = make_batch(BATCHES["padded-2-1-0-images"]), []
    for policy in (Reversed(keep=4), vlmprune.FastV(keep=4)):
        with torch.no_grad(), vlmprune.prune(model, policy) as run:
            model(**batch)
        seen.append(run.stages[0])
    assert seen[0].path == "Reversed chooses by itself" and seen[0].kept == seen[1].kept
    assert not torch.equal(seen[0].index, seen[1].index)


def test_a_subclass_that_selects_is_asked():
    @dataclass(frozen=True)
    class First(vlmprune.FastV):
        def select(self, ctx):
            return super().select(replace(ctx))

    assert vlmprune.FastV().ranks(2) and not First().ranks(2)
    assert not vlmprune.Stages([First()]).ranks(2)
    with pytest.raises(
        ValueError, match=r"^DivPrune: expected `rank` of its own at a stage where it ranks, got none$"
    ):
        vlmprune.DivPrune(positions="pack").rank(None)


@pytest.mark.gpu
@pytest.mark.parametrize("policy", [RANKING[0], RANKING[6], RANKING[11]], ids=repr)
def test_on_a_gpu_a_prefill_waits_no_more_than_an_unpruned_one(policy, device):
    """And gives the tokens of the reference; fixed counts are known on the host."""
    model, batch = make_model().to(device), make_batch(BATCHES["one"])
    with torch.no_grad(), vlmprune.prune(cpu := make_model().cpu(), policy) as run:
        want, stages = cpu(**{name: x.cpu() for name, x in batch.items()}).logits, run.stages
    batch = {name: x.to(device) for name, x in batch.items()}
    waits = []
    for scope in (vlmprune.meter(model), vlmprune.prune(model, policy)):
        with torch.no_grad(), scope as run:
            for _ in range(3):
                got = model(**batch).logits
            torch.cuda.set_sync_debug_mode("warn")
            try:
                with warnings.catch_warnings(record=True) as seen:
                    warnings.simplefilter("always")
                    model(**batch)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        waits.append(sum("synchroniz" in str(warning.message) for warning in seen))
    assert waits[1] <= waits[0]
    assert run.report().paths == ("one pass (triton)",) * len(policy.layers)
    assert all(torch.equal(a.index.cpu(), b.index) for a, b in zip(run.stages, stages, strict=True))
    torch.testing.assert_close(got.cpu(), want, atol=1e-3, rtol=0)


# From a review: what a pass must hold beside the rows.


@pytest.mark.parametrize("policy", [RANKING[3], RANKING[6], RANKING[11]], ids=repr)
def test_plans_of_a_further_turn_with_padding(model, policy):
    """Its padding is cut out of a longer mask, which a kernel could not read in place."""
    first, second = make_batch([[4, "I", 7], [3, "I"]]), make_batch([["I", 5], ["I", 2]], seed=1)
    mask = torch.cat([first["attention_mask"], second["attention_mask"]], 1)
    seen = []
    for backend in ("reference", "triton"):
        with torch.no_grad(), ops.use_backend(backend), vlmprune.prune(model, policy) as run:
            for _ in range(3):
                cache = model(**first, use_cache=True).past_key_values
                out = model(**{**second, "attention_mask": mask}, past_key_values=cache)
            seen.append((out.logits, [stage.index for stage in run.stages]))
    assert all(map(torch.equal, seen[0][1], seen[1][1]))
    torch.testing.assert_close(seen[0][0], seen[1][0], atol=TOLERANCE, rtol=0)


def test_plans_know_settings_by_their_names(model):
    """The same word for heads in one call and for rows in another."""
    turn = iter([{"head_reduce": "max"}, {"row_reduce": "max"}] * 4)

    @dataclass(frozen=True)
    class Turns(vlmprune.FastV):
        def needs(self, layer):
            return vlmprune.Needs(attention="previous", rows="text")

        def rank(self, ctx):
            return Ranking(ctx.given("attention").rating(**next(turn)), tuple(quotas(ctx, self)))

    batch, kept = make_batch(BATCHES["one"]), []
    with torch.no_grad(), ops.use_backend("triton"), vlmprune.prune(model, Turns(keep=5)) as run:
        for _ in range(6):
            model(**batch)
            kept.append(run.kept().tolist())
    assert kept[0] == kept[2] == kept[4] != kept[1] == kept[3] == kept[5]


def test_assisted_decoding_and_training_choose_as_plain_decoding_does(model):
    """Also where the prompt ends with its image, whose newest token takes the place of the worst one kept."""
    batch, index = make_batch([[4, "I"]]), []
    with torch.no_grad(), vlmprune.prune(model, vlmprune.FastV(layer=2, keep=4)) as run:
        model(**batch, logits_to_keep=1)
        index.append(run.stages[0].index)
        ids = torch.cat([batch["input_ids"], torch.tensor([[7, 8]])], 1)
        model(**{**batch, "input_ids": ids, "attention_mask": torch.ones_like(ids)}, logits_to_keep=3)
        assert "candidates" in run.report().paths[0]
        index.append(run.stages[0].index)
    assert torch.equal(*index) and index[0][0, -1] == 20


@pytest.mark.cpu("only there are the values of a list looked at, which a GPU would be waited for")
def test_a_constant_that_a_policy_writes_to_reaches_nobody_else(model):
    @dataclass(frozen=True)
    class Spoils(vlmprune.Feather):
        def rank(self, ctx):
            ranking = super().rank(ctx)
            ranking.code.zero_()
            ctx.given("attention").last.sub_(3)
            return ranking

    batch, policy = make_batch(BATCHES["one"]), vlmprune.Feather(layers=(2, 4), keep=0.1)
    with torch.no_grad(), vlmprune.prune(model, policy) as run:
        model(**batch)
        want = run.kept_at(0).tolist()
    with torch.no_grad(), vlmprune.prune(model, Spoils(layers=(2, 4), keep=0.1)), pytest.raises(ValueError):
        model(**batch)
    with torch.no_grad(), vlmprune.prune(model, policy) as run:
        model(**batch)
    assert run.kept_at(0).tolist() == want


def test_whichever_of_rank_and_select_is_nearer_counts():
    class Selects:
        def select(self, ctx):
            raise NotImplementedError

    class Mixed(Selects, vlmprune.FastV):
        pass

    class Ranks:
        def rank(self, ctx):
            raise NotImplementedError

    class Other(Ranks, vlmprune.DivPrune):
        pass

    assert not Mixed().ranks(2) and Other().ranks(0)


def equal_scores():
    return torch.zeros(1, 16)


def fifteen_columns():
    key, every = torch.zeros(1, 1, 16, 8), torch.arange(16)[None]
    return Rating(Scoring(key, key, every[:, :1], every[:, :15], 1.0))


WRONG = {
    "a tensor": (lambda: torch.zeros(1, 16), r"rank\(ctx\): expected a Ranking, got torch\.float32"),
    "nothing": (lambda: None, r"rank\(ctx\): expected a Ranking, got None"),
    "wide scores": (
        lambda: Ranking(torch.zeros(1, 17), (4,)),
        r"scores: expected floats \[1, 16\] on \S+, got",
    ),
    "whole scores": (
        lambda: Ranking(torch.zeros(1, 16).long(), (4,)),
        r"scores: expected floats .* got torch\.int64",
    ),
    "a bare keep": (
        lambda: Ranking(equal_scores(), 4),
        r"keep: expected a tuple: one count a sample, at most \(\(16,\),\), got 4",
    ),
    "too many": (lambda: Ranking(equal_scores(), (17,)), r"keep: expected .* got \(17,\)"),
    "none": (lambda: Ranking(equal_scores(), (0,)), r"keep: expected at least one token, got \(0,\)"),
    "images": (
        lambda: Ranking(equal_scores(), ((2, 2),), ((8, 7),)),
        r"images: expected tokens that add up to \(16,\)",
    ),
    "an image's keep": (
        lambda: Ranking(equal_scores(), ((9, 2),), ((8, 8),)),
        r"keep: expected a tuple: a count for each image",
    ),
    "extra": (
        lambda: Ranking(equal_scores(), (4,), extra=(-1,)),
        r"extra: expected 1 whole numbers >= 0, one a sample, or None",
    ),
    "columns": (
        lambda: Ranking(fifteen_columns(), (4,)),
        r"rank\(ctx\)\.scores: expected a column for every token, \[1, 16\], got \[1, 15\]",
    ),
    "positions": (
        lambda: Ranking(equal_scores(), (4,), positions="squeeze"),
        r"positions: expected 'keep' or 'pack', got 'squeeze'",
    ),
    "a code": (
        lambda: Ranking(equal_scores(), (4,), code=torch.full((1, 16), 4, dtype=torch.int8)),
        r"sample 0: expected 0, 1, 2 or 3",
    ),
    "codes": (
        lambda: Ranking(equal_scores(), (4,), code=torch.ones(1, 16)),
        r"code: expected int8 \[1, 16\], got torch\.float32",
    ),
    "nothing left": (
        lambda: Ranking(equal_scores(), (4,), code=torch.full((1, 16), 2, dtype=torch.int8)),
        r"sample 0: expected at least 4 that compete, got 0",
    ),
    "more than said": (
        lambda: Ranking(equal_scores(), (4,), code=torch.full((1, 16), 3, dtype=torch.int8), extra=(2,)),
        r"sample 0: expected at most 2 that stay in any case, as extra says, got 16",
    ),
}


@pytest.mark.parametrize("answer, message", WRONG.values(), ids=WRONG)
def test_a_ranking_that_means_nothing_is_refused(model, answer, message):
    @dataclass(frozen=True)
    class Wrong(PruningPolicy):
        layer: int = 2
        keep: int = 4

        def rank(self, ctx):
            return answer()

    batch = make_batch(BATCHES["one"])
    with torch.no_grad():
        want = model(**batch).logits
        with vlmprune.prune(model, Wrong()), pytest.raises(ValueError, match=message):
            model(**batch)
        assert torch.equal(model(**batch).logits, want)
