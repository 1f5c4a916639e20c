"""DART against its procedure in plain loops and real sets: pivots by norm, then the least similar tokens of each in turn."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers.contexts import kept_lists, text_case, top
from vlmprune.policies.base import AttentionInputs, Needs
from vlmprune.policies.methods.dart import DART
from vlmprune.policies.schedule import stage_counts

CASES = [
    pytest.param({"images": ["square"]}, id="one-image"),
    pytest.param({"images": ["tall"], "stretch": 1.3}, id="stretched-rope"),
    pytest.param({"images": ["two", "none", "tall"]}, id="ragged"),
    pytest.param({"images": ["two", "tall"], "past": True}, id="cached-past"),
    pytest.param({"images": ["two"], "kept": [[0, 3, 7, 20, 21, 22, 30, 34]]}, id="after-a-stage"),
    pytest.param({"images": [((1, 1),), ((1, 2),), ((2, 3),)]}, id="few-tokens"),
]


class AsOneOfTwo(AttentionInputs):
    """Attention of which this rank holds half the heads: the other's norms are the same."""

    @property
    def joined(self):
        return self.__dict__.setdefault("_joined", [])

    def chunk(self):
        return self

    def across_ranks(self, x, head_reduce):
        self.joined.append((head_reduce, len(x)))
        return 2 * x


def cosine(a, b):
    return float(a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-12))


def falling(norms, count):
    """The ``count`` largest, the largest first."""
    return sorted(range(len(norms)), key=lambda j: (-norms[j], j))[:count]


def slow_dart(made, sample, policy):
    """The kept tokens of one sample, one after the other."""
    ctx = made.ctx
    n, t, start = ctx.counts[sample], int((ctx.text[sample] >= 0).sum()), int(ctx.start[sample])
    states = [*ctx.hidden[sample, :n], *ctx.text_hidden[sample, :t]]
    places = [int(p) - start for p in (*ctx.positions[sample, :n], *ctx.text[sample, :t])]
    if policy.layer == 0:
        norms = [float(x.double().abs().sum()) for x in states]
    else:
        rows = [*ctx.attention.columns[sample, :n].tolist(), *ctx.attention.rows[sample, :t].tolist()]
        norms = [float(ctx.attention.key[sample, :, row].double().abs().sum()) for row in rows]
        states = [ctx.norm(x) for x in states]
    states = [x.double().cpu().numpy() for x in states]

    keep, all_pivots = policy.keep, sum(policy.pivots)
    total = min(n, max(1, int(n * keep + 1e-6)) if isinstance(keep, float) else keep * len(ctx.grids[sample]))
    first = min(policy.pivots[0], n if policy.count == "released" else total)
    if policy.count == "released":
        total = min(n, max(1, first + total // all_pivots * all_pivots))
    image = falling(norms[:n], first)
    words = [n + w for w in falling(norms[n:], policy.pivots[1])]
    by_place = {places[p]: p for p in image + words}
    takers = image + words
    if policy.order == "released":
        takers = [by_place[place] for place in set([places[p] for p in takers])]
    kept = list(image)
    for turn, pivot in enumerate(takers):
        share, extra = divmod(total - first, len(takers))
        free = [j for j in range(n) if j not in kept]
        near = [cosine(states[pivot], states[j]) for j in free]
        kept += [free[f] for f in top([-c for c in near], share + (turn < extra))]
    free = [j for j in range(n) if j not in kept]
    kept += [free[f] for f in top([norms[j] for j in free], total - len(kept))]
    return sorted(kept)


def assert_equals_the_procedure(made, policy):
    index = policy.select(made.ctx)
    got = kept_lists(index)
    assert got == [slow_dart(made, sample, policy) for sample in range(len(got))]
    assert index.shape[1] == max(map(len, got))


@pytest.mark.parametrize("settings", CASES)
@pytest.mark.parametrize("count", ["released", "exact"])
@pytest.mark.parametrize("order", ["released", "norm"])
@pytest.mark.parametrize(
    "keep, pivots", [(16, (4, 4)), (0.5, (2, 1)), (3, (4, 4)), (11, (0, 9)), (10, (3, 0)), (1.0, (4, 4))]
)
def test_equals_the_procedure(settings, count, order, keep, pivots):
    made = text_case(**settings, layer=2)
    assert_equals_the_procedure(made, DART(keep=keep, pivots=pivots, count=count, order=order))


@pytest.mark.parametrize(
    "settings", [case for case in CASES if case.id not in ("cached-past", "after-a-stage")]
)
@pytest.mark.parametrize("order", ["released", "norm"])
@pytest.mark.parametrize("keep, pivots", [(16, (4, 4)), (0.5, (2, 1)), (11, (0, 3)), (10, (3, 0))])
def test_before_the_language_model(settings, order, keep, pivots):
    """Layer 0: embeddings have the norms and are compared as they are."""
    made = text_case(**settings, layer=0)
    made = replace(made, ctx=replace(made.ctx, attention=None, norm=None))
    assert_equals_the_procedure(made, DART(layer=0, keep=keep, pivots=pivots, count="exact", order=order))


def test_released_order_where_it_tells():
    """More rows than slots, so places collide; the order by norm mostly chooses otherwise."""
    others = 0
    for seed in range(20):
        made = text_case([((24, 24),)], layer=2, seed=seed, H=2, D=4)
        assert_equals_the_procedure(made, DART(keep=64))
        choices = (DART(keep=64, order=order).select(made.ctx) for order in ("released", "norm"))
        others += not torch.equal(*choices)
    assert others > 10


def test_padding_does_not_change_the_order():
    """Positions count from the prompt's first token on."""
    others = 0
    for seed in range(20):
        ctx = text_case([((24, 24),)], layer=2, seed=seed).ctx
        moved = replace(ctx, positions=ctx.positions + 5, text=ctx.text + 5, start=ctx.start + 5)
        wrong = replace(moved, start=ctx.start)
        want, got, other = (DART(keep=64).select(c) for c in (ctx, moved, wrong))
        assert torch.equal(got, want)
        others += not torch.equal(other, want)
    assert others


def test_heads_on_several_ranks():
    """The norms of keys count the heads of all ranks."""
    made = text_case(["square"])
    half = AsOneOfTwo(**vars(replace(made.ctx.attention, key=made.ctx.attention.key / 2)))
    policy = DART(keep=9)
    assert torch.equal(policy.select(replace(made.ctx, attention=half)), policy.select(made.ctx))
    assert half.joined == [("sum", made.ctx.attention.rows.shape[0])]


def test_equal_tokens():
    """Constant features: every choice is a tie, and goes to the lower position."""
    made = text_case(["square"])
    seen = replace(made.ctx.attention, key=torch.ones_like(made.ctx.attention.key))
    ctx = replace(made.ctx, hidden=torch.ones_like(made.ctx.hidden), attention=seen)
    assert kept_lists(DART(keep=16, pivots=(4, 0)).select(ctx)) == [list(range(20))]


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("after", [None, [0, 5, 0], [0, 0, 0]])
@pytest.mark.parametrize("pivots", [(0, 4), (0, 1), (4, 0), (1, 7)])
@pytest.mark.parametrize("count", ["released", "exact"])
@pytest.mark.parametrize("keep", [1, 3, 0.01])
def test_a_sample_keeps_a_token(layer, after, pivots, count, keep):
    """Fewer tokens than pivots, less than a token for each, no visual pivot, no text: one stays at least."""
    made = text_case([((1, 1),), ((1, 2),), ((2, 3),)], layer=layer, after=after)
    policy = DART(layer=layer, keep=keep, pivots=pivots, count=count)
    assert_equals_the_procedure(made, policy)
    assert all(kept_lists(policy.select(made.ctx)))


@pytest.mark.parametrize("count", ["released", "exact"])
@pytest.mark.parametrize("pivots", [(2, 2), (0, 4)])
def test_no_text_after_the_image(count, pivots):
    """Visual pivots take what text pivots would, without any the key norms decide; a neighbour keeps its own."""
    mixed = text_case(["square", "tall"], after=[0, 5])
    policy = DART(keep=9, pivots=pivots, count=count)
    assert_equals_the_procedure(mixed, policy)
    alone = text_case(["square"], after=[0])
    assert alone.ctx.text.shape == (1, 0)
    assert_equals_the_procedure(alone, policy)


def test_published_counts():
    """The README's 128 tokens of 576: sixteen for each of 8 pivots, and the 4 visual pivots themselves."""
    assert stage_counts(DART(), 576) == [(2, 132)]
    assert stage_counts(DART(count="exact"), 576) == [(2, 128)]
    assert stage_counts(DART(keep=0.222), 576) == [(2, 4 + 8 * 15)]


def test_needs():
    keys = DART().needs(2)
    assert keys == Needs(hidden=True, text=True, attention="previous", rows="text", keys_only=True)
    assert DART(layer=0).needs(0) == Needs(hidden=True, text=True)
    assert (keys | Needs(hidden=True)).keys_only
    assert not (keys | Needs(attention="previous")).keys_only


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"layer": -1}, r"^layer: expected a whole number >= 0, got -1$"),
        (
            {"keep": 0},
            r"^keep: expected a share in \(0, 1\] or a whole number of tokens per image >= 1, got 0$",
        ),
        (
            {"pivots": (0, 0)},
            r"^pivots: expected a number of visual and one of text pivots, not both 0, got \(0, 0\)$",
        ),
        ({"pivots": (4,)}, r"^pivots: expected a number of visual"),
        ({"pivots": (4, -1)}, r"^pivots: expected a number of visual"),
        ({"count": "all"}, r"^count: expected 'released' or 'exact', got 'all'$"),
        ({"order": "position"}, r"^order: expected 'released' or 'norm', got 'position'$"),
    ],
)
def test_rejects(settings, message):
    with pytest.raises(ValueError, match=message):
        DART(**settings)


@pytest.mark.parametrize("layer", [0, 2])
def test_says_what_is_missing(layer):
    ctx = text_case(["square"], layer=layer).ctx
    for name in ("hidden", "text", "text_hidden", "start", *(("norm", "attention") if layer else ())):
        with pytest.raises(ValueError, match=rf"^ctx.{name}: expected .* \(declare Needs\("):
            DART(layer=layer).select(replace(ctx, **{name: None}))
