"""CDPruner against its formula: the token that raises the determinant most, found by computing determinants."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers.contexts import case, images_in, kept_lists, sight, text_case
from vlmprune.policies.base import Needs
from vlmprune.policies.choose import choose_greedily, choose_relevant, marks
from vlmprune.policies.methods.cdpruner import CDPruner

BATCHES = [["square"], ["two", "none", "tall"], [((2, 3), (4, 6)), ((3, 3),)], [((1, 1),)], ["none"]]


def by_number(ctx):
    """A relevance that is not constant, for tests of a function."""
    return (ctx.ordinals * 7 % 11).double() - 3


def slow_text(ctx, sample):
    n = ctx.counts[sample]
    words = [ctx.embeds[sample, t].double().cpu().numpy() for t in ctx.text[sample].tolist() if t >= 0]
    tokens = ctx.hidden[sample, :n].double().cpu().numpy()
    cos = [[x @ w / np.linalg.norm(x) / np.linalg.norm(w) for w in words] for x in tokens]
    return np.array(cos).mean(1)


def slow_relevance(ctx, sample, relevance):
    n = ctx.counts[sample]
    if relevance == "none" or n == 0:
        return np.ones(n)
    raw = slow_text(ctx, sample) if relevance == "text" else relevance(ctx)[sample, :n].cpu().numpy()
    span = raw.max() - raw.min()
    return (raw - raw.min() + 1e-6) / span if span > 0 else np.ones(n)


def slow(features, relevance, columns, count):
    """Add the token whose kernel minor is largest, by log-determinants of the whole minor; ties by relevance, then evenly."""
    even = [
        (j // columns * 0.7548776662466927 + j % columns * 0.5698402909980532) % 1
        for j in range(len(features))
    ]
    x = features.double().cpu().numpy()
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    kernel = relevance[:, None] * (x @ x.T) * relevance[None, :]
    chosen = []
    while len(chosen) < count:
        gain = {}
        for j in range(len(x)):
            if j not in chosen:
                gain[j] = round(np.linalg.slogdet(kernel[np.ix_([*chosen, j], [*chosen, j])])[1], 9)
        chosen.append(max(gain, key=lambda j: (gain[j], relevance[j], even[j])))
    return sorted(chosen)


@pytest.mark.parametrize("images", BATCHES)
@pytest.mark.parametrize("relevance", ["text", "none", by_number])
@pytest.mark.parametrize("keep", [4, 0.3])
def test_equals_the_formula(images, relevance, keep):
    """Up to as many tokens of an image as features have dims: after that the kernel has no volume left to rank by."""
    ctx = case(images, layer=0).ctx
    g = torch.Generator().manual_seed(9)
    hidden = torch.randn(*ctx.mask.shape, 24, generator=g)
    text = torch.tensor([[3, 0, 5, 7], [2, 9, -1, -1], [1, 4, 6, -1]])[: len(images)]
    embeds = torch.randn(len(images), 12, 24, generator=g)
    ctx = replace(ctx, hidden=hidden, embeds=embeds, text=text)
    got = CDPruner(keep, relevance, positions="pack").select(ctx)
    for sample, here in enumerate(images_in(ctx)):
        weight, expected = slow_relevance(ctx, sample, relevance), []
        for _, first, (r, c) in here:
            count = min(r * c, keep) if isinstance(keep, int) else max(1, int(keep * r * c))
            at = slice(first, first + r * c)
            expected += [first + p for p in slow(hidden[sample, at], weight[at], c, count)]
        assert kept_lists(got.index)[sample] == expected


def test_a_neighbour_in_the_batch_changes_nothing():
    """The released code scales relevance over the batch."""
    ctx = case(["square", "square"], layer=0).ctx

    def louder(ctx):
        return by_number(ctx) * torch.tensor([[1.0], [50.0]])[: len(ctx.counts)]

    one = replace(ctx, **{n: getattr(ctx, n)[:1] for n in ("mask", "counts", "ordinals", "grids", "hidden")})
    both, alone = (CDPruner(6, louder, positions="pack").select(c).index for c in (ctx, one))
    assert both[0].tolist() == alone[0].tolist()


def test_equal_relevance_is_diversity_alone():
    ctx = case(["square"], layer=0).ctx
    some, none = (
        CDPruner(6, constant, positions="pack").select(ctx),
        CDPruner(6, "none", positions="pack").select(ctx),
    )
    assert torch.equal(some.index, none.index)


def constant(ctx):
    return torch.full(ctx.mask.shape, 0.4)


def test_no_text_is_diversity_alone():
    mixed, alone = (text_case(["square"] * len(a), layer=0, after=a).ctx for a in ([5, 0], [0]))
    for ctx, silent in ((mixed, 1), (alone, 0)):
        text, none = (
            kept_lists(CDPruner(6, r, positions="pack").select(ctx).index) for r in ("text", "none")
        )
        assert text[silent] == none[silent]
    assert alone.text.shape == (1, 0)
    text, none = (kept_lists(CDPruner(6, r, positions="pack").select(mixed).index) for r in ("text", "none"))
    assert text[0] != none[0]


def test_rank_below_the_budget_still_keeps_distinct_tokens():
    """Two directions only: the released code re-picks; here the most relevant tokens fill up."""
    ctx = case(["square"], layer=0).ctx
    ctx = replace(ctx, hidden=torch.eye(8)[torch.arange(36) // 30][None])
    relevance = torch.tensor([[10 + n * 7 % 30 for n in range(30)] + [0, 1, 2, 3, 4, 5]])
    kept = CDPruner(8, lambda ctx: relevance, positions="pack").select(ctx).index[0].tolist()
    best = sorted(range(30), key=lambda n: -(n * 7 % 30))[:7]
    assert kept == [*sorted(best), 35] and best != list(range(7))
    none = CDPruner(8, "none", positions="pack").select(ctx).index[0]
    assert (none >= 30).sum() in (1, 2) and len({j // 6 for j in none.tolist()}) >= 5


@pytest.mark.parametrize("keep", [128, 64, 32])
def test_one_colour_keeps_tokens_spread_over_the_image(keep):
    """Quarters, sixteenths and columns hold their share to within a few tokens: no patch stands out, so no region may."""
    ctx = sight([((24, 24),)])
    ctx = replace(ctx, hidden=ctx.hidden[:, 5:6].expand_as(ctx.hidden))
    kept = CDPruner(keep, positions="pack").select(ctx).index
    marked = marks(kept, 576).view(24, 24).float()
    assert marked.sum() == keep
    for rows, columns in ((12, 12), (6, 6), (24, 3), (3, 24)):
        cells = marked.unfold(0, rows, rows).unfold(1, columns, columns).sum((2, 3))
        assert (cells - keep * rows * columns / 576).abs().max() <= 2
    assert torch.equal(kept, CDPruner(keep, "none", positions="pack").select(ctx).index)
    for broken in (0.0, float("nan")):  # no direction at all, and relevance of none
        ctx = replace(ctx, hidden=torch.full_like(ctx.hidden, broken))
        assert torch.equal(kept, CDPruner(keep, positions="pack").select(ctx).index)


def test_rounding_is_no_relevance():
    """577 equal tokens, of which a matrix product rounds the last otherwise: still all are equally relevant."""
    ctx = sight([((24, 24), (1, 1))])
    ctx = replace(ctx, hidden=torch.randn(64, generator=torch.Generator().manual_seed(3)).expand(1, 577, 64))
    noise = torch.linspace(0, 1e-8, 577)[None] + 0.05
    kept = [
        CDPruner(20, r, spend="prompt", positions="pack").select(ctx).index
        for r in ("none", lambda ctx: noise)
    ]
    assert torch.equal(*kept)


@pytest.mark.parametrize("kept", [(30, 30), (30, 11)])
@pytest.mark.parametrize("padded", [False, True])
def test_where_nothing_ties_the_order_of_ties_is_no_matter(kept, padded):
    """Below the rank the choice is that of the op on the tokens as they are numbered."""
    for seed in range(8):
        g = torch.Generator().manual_seed(seed)
        features, relevance = torch.randn(2, 90, 64, generator=g), torch.rand(2, 90, generator=g)
        mask = torch.arange(90) < torch.tensor([[90], [60]]) if padded else None
        plain = choose_greedily("dpp", kept, mask, features, relevance)
        spread = torch.rand(2, 90, generator=g)
        assert torch.equal(choose_relevant(kept, mask, features, relevance, spread), plain)


@pytest.mark.parametrize("keep", [192, 128, 64])
def test_published_counts(keep):
    assert CDPruner(keep, positions="pack").select(sight([((24, 24),)])).index.shape == (1, keep)


def test_needs():
    assert CDPruner(positions="pack").layers == (0,)
    assert (
        CDPruner(positions="pack").needs(0)
        == CDPruner(relevance=by_number, positions="pack").needs(0)
        == Needs(hidden=True, embeds=True)
    )
    assert CDPruner(relevance="none", positions="pack").needs(0) == Needs(hidden=True)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"keep": -1}, r"^keep: expected a share in .*, got -1$"),
        (
            {"relevance": "clip"},
            r"^relevance: expected 'text', 'none' or a function of the context, got 'clip'$",
        ),
        ({"positions": 0}, r"^positions: expected 'keep' or 'pack', got 0$"),
    ],
)
def test_rejects(settings, message):
    with pytest.raises(ValueError, match=message):
        CDPruner(**settings)


def test_select_errors():
    ctx = sight(["square"])
    with pytest.raises(
        ValueError, match=r"^relevance: expected a function that returns \(1, 36\), got \(36,\)$"
    ):
        CDPruner(relevance=lambda ctx: ctx.hidden[0, :, 0], positions="pack").select(ctx)
    for name in ("hidden", "embeds", "text"):
        with pytest.raises(
            ValueError, match=rf"^ctx\.{name}: expected .* \(declare Needs\(.*\)\), got None$"
        ):
            CDPruner(positions="pack").select(replace(ctx, **{name: None}))
