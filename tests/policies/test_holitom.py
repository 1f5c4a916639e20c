"""HoliTom against its formulas in plain loops: every way to cut a video, means over time, clusters, mergers one by one."""

from dataclasses import replace
from itertools import combinations, pairwise

import pytest
import torch

from helpers.contexts import case, kept_lists, patch_scores, sight, top
from helpers.films import check_merged, clips, cosine, film, in_turn, mean, slow_peaks
from helpers.videos import NEWLINE, videos
from vlmprune.policies.base import Needs
from vlmprune.policies.methods.holitom import HoliTom
from vlmprune.policies.parts.peaks import in_proportion
from vlmprune.policies.parts.segments import best_cuts


def ways(frames):
    """Every way to cut frames into runs, as the list of (first, last)."""
    for k in range(frames):
        for cuts in combinations(range(1, frames), k):
            edges = [0, *cuts, frames]
            yield [(a, b - 1) for a, b in pairwise(edges)]


def still(alike, first, last):
    """Places alike the frame before all through."""
    places = range(len(alike[0]))
    return [p for p in places if last > first and all(alike[f][p] for f in range(first + 1, last + 1))]


def cut_slowly(alike, longest=10_000):
    """Of the best ways the one whose last run is the shortest, and so on from the end."""

    def worth(way):
        return sum((last - first) * len(still(alike, first, last)) for first, last in way)

    some = [way for way in ways(len(alike)) if all(last - first < longest for first, last in way)]
    best = max(map(worth, some))
    return min((way for way in some if worth(way) == best), key=lambda way: [b - a for a, b in way[::-1]])


def video_slowly(x, score, K, tau, beta):
    """``x[f][p]`` rows and ``score[f][p]`` of one video: ``{(f, p): row}`` of K tokens."""
    F, P = len(x), len(x[0])
    alike = [[f > 0 and cosine(x[f][p], x[f - 1][p]) > tau for p in range(P)] for f in range(F)]
    groups, others = [], []
    for first, last in cut_slowly(alike):
        calm = still(alike, first, last)
        for f in range(first, last + 1):
            groups.append(("lead", f, calm if f == first else [], last))
            groups.append(("moving", f, [p for p in range(P) if p not in calm], last))
            others += [(f, p) for p in calm if f > first]
    distinct = sum(len(places) for _, _, places, _ in groups)
    more = others[: K - min(K, distinct)]
    out = {place: x[place[0]][place[1]] for place in more}
    shares = in_turn([len(places) for _, _, places, _ in groups], min(K, distinct))
    for (kind, f, places, last), share in zip(groups, shares, strict=True):
        if kind == "moving":
            for i in top([score[f][p] for p in places], share):
                out[f, places[i]] = x[f][places[i]]
            continue
        rows = [mean([x[t][p] for t in range(f, last + 1) if (t, p) not in more]) for p in places]
        joined = slow_peaks(rows, share, min(7, share)) if rows else []
        for i, centre in enumerate(joined):
            if i == centre:
                own = [rows[j] for j in range(len(rows)) if joined[j] == i and j != i]
                rest = mean(own) if own else rows[i]
                out[f, places[i]] = [beta * a + (1 - beta) * b for a, b in zip(rows[i], rest, strict=True)]
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
            made = video_slowly(x, score, K, policy.tau, policy.beta)
            tokens |= {first + f * P + p: row for (f, p), row in made.items()}
        found.append(tokens)
    return found


def check(policy, ctx):
    return check_merged(policy, ctx, slow(policy, ctx))


VIDEOS = [[(6,)], [(5, 1), (), (3,)], [(1,), (2, 4)]]


@pytest.mark.parametrize("videos", VIDEOS, ids=str)
@pytest.mark.parametrize("keep", [1, 9, 0.25, 0.6, 0.95, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_equals_the_formula(videos, keep, seed):
    check(HoliTom(keep=keep, tau=(0.8, 0.65, 0.3)[seed]), film(videos, seed=seed))


@pytest.mark.parametrize("cls", [True, False])
def test_ties_and_doubles(cls):
    """Rows of signs, of which frames repeat: exact doubles, which are one place still."""
    got = check(HoliTom(keep=0.3, beta=0.25), film([(6,), (4,)], cls=cls, few=True))
    assert (got.merged >= 0).any()


def test_a_frozen_video_is_one_frame_and_more_stays_only_if_asked_for():
    ctx = film([(4,)])
    ctx = replace(ctx, hidden=ctx.hidden[:, :12].repeat(1, 4, 1))
    got = check(HoliTom(keep=12), ctx)
    assert got.index.tolist() == [list(range(12))]
    assert torch.equal(got.merged[0, 12:].view(3, 12), torch.arange(12).expand(3, -1))
    assert check(HoliTom(keep=20), ctx).index.tolist() == [list(range(20))]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("longest", [1, 3, 1024])
def test_best_cuts(seed, longest):
    g = torch.Generator().manual_seed(seed)
    alike = torch.rand(2, 6, 4, generator=g) < (0.5, 0.8)[seed % 2]
    alike[:, 0] = False
    for own, starts in zip(alike.tolist(), best_cuts(alike, longest).tolist(), strict=True):
        assert [f for f in range(6) if starts[f]] == [first for first, _ in cut_slowly(own, longest)]


@pytest.mark.parametrize("then", [1, 7, 0.5, 0.9])
@pytest.mark.parametrize("seed", range(3))
def test_the_second_stage_merges_one_by_one(then, seed):
    made = case(["square", "tall", "none"], layer=2, last_only=True, seed=seed)
    ctx, policy = made.ctx, HoliTom(then=then, layer=2)
    got = policy.select(ctx)
    scores = ctx.attention.received(ctx.attention.last)
    for b, n in enumerate(ctx.counts):
        kept = top([round(s, 7) for s in scores[b, :n].tolist()], policy.kept(n, 1, 2)) if n else []
        assert kept_lists(got.index)[b] == kept
        x = ctx.hidden[b].double().tolist()
        now = [list(row) for row in x]
        for j in range(n):
            if j not in kept:
                nearest = max(kept, key=lambda i: (cosine(x[j], x[i]), -i))
                now[nearest] = [(a + b) / 2 for a, b in zip(now[nearest], x[j], strict=True)]
                assert got.merged[b, j] == nearest
        if kept:
            rows = torch.tensor([now[i] for i in kept])
            torch.testing.assert_close(got.hidden[b, : len(kept)], rows, atol=1e-5, rtol=1e-5)


def test_shares_add_up():
    sizes = torch.randint(0, 9, (50, 7), generator=torch.Generator().manual_seed(0))
    for total in (0, 1, 5):
        shares = in_proportion(sizes, torch.minimum(torch.tensor(total), sizes.sum(1)))
        assert torch.equal(shares.sum(1), sizes.sum(1).clamp(max=total))
        assert ((shares >= 0) & (shares <= sizes)).all()
    assert in_proportion(sizes, sizes.sum(1)).tolist() == sizes.tolist()


def test_an_image_is_one_frame():
    """Chosen by attention alone."""
    ctx = sight(["square"], layers=(-1,))
    got = HoliTom(keep=7).select(ctx)
    assert got.index.tolist() == [top(patch_scores(ctx, -1, 0), 7)]
    assert torch.equal(got.hidden, ctx.hidden[:, got.index[0]])


@pytest.mark.parametrize("keep", [1, 15, 0.3, 0.99, 1.0, 49])
def test_newlines_and_frames_of_other_shapes(keep):
    """A newline token stays once all others of its video do; a frame of another shape begins a run."""
    small = [[(3, 3), (2, 2), (2, 2)], [(2, 5), (2, 5)]]
    ctx = videos([[[(3, 4)] * 4 + [NEWLINE]], small], layers=(-1,), few_values=True)
    got, policy = HoliTom(keep=keep, tau=0.9).select(ctx), HoliTom(keep=keep)
    counts = [sum(policy.kept(n, 1, 0) for n in own) for own in ctx.sizes]
    kept = kept_lists(got.index)
    assert [len(own) for own in kept] == counts
    assert (48 in kept[0]) == (counts[0] == 49)
    assert len([i for i in kept[1] if i < 17]) == policy.kept(17, 1, 0)


def test_no_images_and_needs():
    assert HoliTom().select(sight(["none", "none"], layers=(-1,))).shape == (2, 0)
    policy = HoliTom(layer=9, vision_layer=-2)
    assert policy.layers == (0, 9) and policy.needs(0) == Needs(hidden=True, vision=(-2,))
    assert policy.needs(9) == Needs(hidden=True, attention="previous")
    assert (policy.kept(100, 2, 0), policy.kept(100, 2, 9)) == (14, 50)
    assert HoliTom(positions="pack").select(film([(3,)])).positions == "pack"


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"keep": 0.0},
            r"^keep: expected a share in \(0, 1\] or a whole number of tokens per image >= 1, got 0.0$",
        ),
        (
            {"then": 2.0},
            r"^then: expected a share in \(0, 1\] or a whole number of tokens per image >= 1, got 2.0$",
        ),
        ({"layer": 0}, r"^layer: expected a whole number >= 1 \(stage 1 is at layer 0\), got 0$"),
        ({"tau": "high"}, r"^tau: expected a number, got 'high'$"),
        ({"beta": 1.5}, r"^beta: expected a share in \[0, 1\], got 1.5$"),
        ({"longest": 0}, r"^longest: expected a whole number >= 1, got 0$"),
        ({"vision_layer": 0.5}, r"^vision_layer: expected a whole number, got 0.5$"),
        ({"positions": "own"}, r"^positions: expected 'keep' or 'pack', got 'own'$"),
    ],
)
def test_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        HoliTom(**settings)
