"""FlashVID against its formulas in plain loops: choices one by one, links, trees, clusters, then FastV."""

from dataclasses import replace
from itertools import pairwise
from math import ceil

import pytest
import torch

from helpers.contexts import case, kept_lists, patch_scores, sight, top
from helpers.films import check_merged, clips, cosine, dot, film, in_turn, mean, slow_peaks
from helpers.videos import NEWLINE, videos
from vlmprune.policies.base import Needs, Ranking
from vlmprune.policies.methods.flashvid import FlashVID
from vlmprune.policies.parts.turns import farthest


def segments_of(x, policy):
    """(first, last) of every segment."""
    means = [mean(frame) for frame in x]
    likeness = [cosine(a, b) for a, b in pairwise(means)]
    cuts = [f for f, c in enumerate(likeness) if c < policy.cut]
    spare = sorted((f for f in range(len(likeness)) if f not in cuts), key=lambda f: (likeness[f], f))
    cuts = sorted(cuts + spare[: max(0, policy.segments - 1 - len(cuts))])
    edges = [-1, *cuts, len(x) - 1]
    return [(edges[i] + 1, edges[i + 1]) for i in range(len(edges) - 1)]


def chosen_slowly(rows, weights, count):
    """One after another, of highest least weighted distance to the chosen ones."""
    P = range(len(rows))
    d = [[round(weights[j] * (1 - cosine(rows[i], rows[j])), 11) for j in P] for i in P]
    kept = []
    for _ in range(count):
        if kept:
            value = [min(d[i][j] for i in kept) for j in P]
        else:
            value = [sorted(d[i][j] for i in P)[min(1, len(P) - 1)] for j in P]
        kept.append(max((j for j in P if j not in kept), key=lambda j: (value[j], -j)))
    return kept


def links_of(x, free, first, last, spare, tau):
    """``{(f, p): (f - 1, place)}`` of a segment, L = spare too many at most."""
    best = {}
    for f in range(first, last + 1):
        for p in range(len(x[0])):
            likeness, to = -1.0, None
            if f > first and p in free[f]:
                some = [(cosine(x[f][p], x[f - 1][q]), -q) for q in free[f - 1]]
                likeness, to = max(some, default=(-1.0, None))
            best[f, p] = likeness, to
    above = [c for c, _ in best.values() if c > tau]
    limit = tau
    if len(above) > spare:
        limit = sorted((c for c, _ in best.values()), reverse=True)[spare - 1] if spare else 2.0
    limit = max(limit, -1 + 1e-6)
    return {place: (place[0] - 1, -to) for place, (c, to) in best.items() if to is not None and c > limit}


def trees_of(x, links, tokens, divide):
    """The row of every tree, by its root, and the root of each token."""
    root = {}
    for place in tokens:
        at = place
        while at in links:
            at = links[at]
        root[place] = at
    rows = {}
    for r in set(root.values()):
        own = [x[f][p] for (f, p), to in root.items() if to == r]
        parts = len(own) if divide == "tokens" else 1 + list(links.values()).count(r)
        rows[r] = [v * len(own) / parts for v in mean(own)]
    return rows, root


def video_slowly(x, score, kept, policy):
    """``{(f, p): row}`` of one video whose frames keep ``kept[f]`` tokens."""
    out, P = {}, range(len(x[0]))
    firsts = [ceil(policy.alpha * k - 1e-9) for k in kept]
    for first, last in segments_of(x, policy):
        frames = range(first, last + 1)
        event, free = mean([mean(x[f]) for f in frames]), {}
        for f in frames:
            weights = [score[f][p] * (dot(x[f][p], event) if policy.events else 1) for p in P]
            chosen = chosen_slowly(x[f], weights, firsts[f])
            out |= {(f, p): x[f][p] for p in chosen}
            free[f] = [p for p in P if p not in chosen]
        left = sum(kept[f] - firsts[f] for f in frames)
        links = links_of(x, free, first, last, sum(map(len, free.values())) - left, policy.tau)
        rows, _ = trees_of(x, links, [(f, p) for f in frames for p in free[f]], policy.divide)
        heads = [[p for p in free[f] if (f, p) in rows] for f in frames]
        for f, own, share in zip(frames, heads, in_turn(list(map(len, heads)), left), strict=True):
            joined = slow_peaks([rows[f, p] for p in own], share, min(7, share)) if own else []
            for i, centre in enumerate(joined):
                if i == centre:
                    out[f, own[i]] = mean([rows[f, own[j]] for j in range(len(own)) if joined[j] == i])
    return out


def slow(policy, ctx):
    """Per sample ``{token: row}``."""
    found = []
    for b, here in enumerate(clips(ctx)):
        tokens = {}
        for number, first, F, P in here:
            x = ctx.hidden[b, first : first + F * P].double().view(F, P, -1).tolist()
            score = [patch_scores(ctx, -1, number + f) for f in range(F)]
            K = min(F * P, policy.kept(F * P, 1, 0))
            kept = [K // F + (f < K % F) for f in range(F)]
            made = video_slowly(x, score, kept, policy)
            tokens |= {first + f * P + p: row for (f, p), row in made.items()}
        found.append(tokens)
    return found


def check(policy, ctx):
    return check_merged(policy, ctx, slow(policy, ctx))


VIDEOS = [[(6,)], [(5, 1), (), (3,)], [(1,), (2, 4)]]


@pytest.mark.parametrize("videos", VIDEOS, ids=str)
@pytest.mark.parametrize("keep", [1, 9, 0.25, 0.8, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_equals_the_formula(videos, keep, seed):
    some = dict(events=bool(seed % 2), segments=(1, 3, 8)[seed], cut=(-2.0, 0.5, 0.9)[seed])
    policy = FlashVID(keep=keep, tau=(0.8, 0.5, 0.3)[seed], alpha=(0.7, 0.3, 0.5)[seed], **some)
    check(policy, film(videos, seed=seed))


@pytest.mark.parametrize("divide", ["tokens", "links"])
@pytest.mark.parametrize("alpha", [0.0, 0.2, 1.0])
def test_deep_trees(divide, alpha):
    policy = FlashVID(keep=0.2, tau=0.5, segments=1, cut=-2, divide=divide, alpha=alpha, events=False)
    got = check(policy, film([(8,)], cls=True, seed=4))
    assert got.index.shape == (1, 19)


@pytest.mark.parametrize("budget", [8, 11])
def test_no_more_links_than_the_budget_allows(budget):
    """Of frames that are all alike every token could be linked."""
    ctx = film([(4,)], seed=2)
    rows = ctx.hidden[:, :12].repeat(1, 4, 1) + 0.05 * ctx.hidden
    check(FlashVID(keep=4 * budget, segments=1, cut=-2, tau=-2), replace(ctx, hidden=rows))


def test_a_negative_weight_chooses_nobody_twice():
    g = torch.Generator().manual_seed(0)
    x, weights = torch.randn(3, 9, 5, generator=g), torch.randn(3, 9, generator=g)
    real = torch.arange(9) < torch.tensor([[9], [7], [1]])
    marks = farthest(x, weights, real, (9, 4, 1))
    assert marks.sum(1).tolist() == [9, 4, 1] and not (marks & ~real).any()
    for i, (n, k) in enumerate(((9, 9), (7, 4), (1, 1))):
        want = chosen_slowly(x[i, :n].double().tolist(), weights[i, :n].double().tolist(), k)
        assert marks[i].nonzero()[:, 0].tolist() == sorted(want)
    assert not farthest(x, weights, real, (0, 0, 0)).any()


@pytest.mark.parametrize("keep", [1, 15, 0.3, 1.0, 49])
def test_newlines_and_frames_of_other_shapes(keep):
    small = [[(3, 3), (2, 2), (2, 2)], [(2, 5), (2, 5)]]
    ctx = videos([[[(3, 4)] * 4 + [NEWLINE]], small], layers=(-1,), few_values=True)
    policy = FlashVID(keep=keep, segments=1, cut=-2)
    kept = kept_lists(policy.select(ctx).index)
    counts = [sum(policy.kept(n, 1, 0) for n in own) for own in ctx.sizes]
    assert [len(own) for own in kept] == counts and (48 in kept[0]) == (counts[0] == 49)


def test_an_image_is_one_frame():
    ctx = sight(["tall", "tall"], layers=(-1,))
    policy = FlashVID(keep=9)
    got = policy.select(ctx)
    for b in (0, 1):
        x, score = ctx.hidden[b].double().tolist(), patch_scores(ctx, -1, b)
        assert kept_lists(got.index)[b] == sorted(p for _, p in video_slowly([x], [score], [9], policy))


def test_the_second_stage():
    made = case(["tall", "none", "square"], layer=20, last_only=True)
    ctx = made.ctx
    ranking = FlashVID().rank(ctx)
    assert isinstance(ranking, Ranking) and ranking.static
    scores, got = ctx.attention.received(ctx.attention.last), kept_lists(ranking.index(ctx))
    for b, n in enumerate(ctx.counts):
        assert got[b] == (top(scores[b, :n].tolist(), ceil(0.3 * n)) if n else [])


def test_counts_needs_and_no_images():
    assert FlashVID().select(sight(["none", "none"], layers=(-1,))).shape == (2, 0)
    policy = FlashVID(vision_layer=-2)
    assert policy.layers == (0, 20) and not policy.ranks(0) and policy.ranks(20)
    assert policy.needs(0) == Needs(hidden=True, vision=(-2,))
    assert policy.needs(20) == Needs(attention="previous")
    assert [policy.kept(101, 1, layer) for layer in (0, 20)] == [31, 31]
    assert [FlashVID(keep=5, then=3).kept(101, 2, layer) for layer in (0, 20)] == [10, 6]
    assert FlashVID(positions="pack").select(film([(3,)])).positions == "pack"


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"keep": 0},
            r"^keep: expected a share in \(0, 1\] or a whole number of tokens per image >= 1, got 0$",
        ),
        (
            {"then": 0},
            r"^then: expected a share in \(0, 1\] or a whole number of tokens per image >= 1, got 0$",
        ),
        ({"layer": 0}, r"^layer: expected a whole number >= 1 \(stage 1 is at layer 0\), got 0$"),
        ({"alpha": 2}, r"^alpha: expected a share in \[0, 1\], got 2$"),
        ({"events": 1}, r"^events: expected True or False, got 1$"),
        ({"tau": "0.8"}, r"^tau: expected a number, got '0.8'$"),
        ({"cut": None}, r"^cut: expected a number, got None$"),
        ({"segments": 0}, r"^segments: expected a whole number >= 1, got 0$"),
        ({"divide": "depth"}, r"^divide: expected 'tokens' or 'links', got 'depth'$"),
        ({"vision_layer": 0.5}, r"^vision_layer: expected a whole number, got 0.5$"),
        ({"positions": "own"}, r"^positions: expected 'keep' or 'pack', got 'own'$"),
    ],
)
def test_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        FlashVID(**settings)
