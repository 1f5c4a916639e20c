"""PruneVid against its formulas in plain loops: stretches of frames, pairs of a place, clusters, the question's attention."""

from dataclasses import replace
from itertools import groupby

import pytest
import torch

from helpers.contexts import kept_lists, text_case, top
from helpers.films import clips, cosine, film, in_turn, mean, slow_peaks
from vlmprune.policies.base import Needs
from vlmprune.policies.methods.prunevid import PruneVid
from vlmprune.policies.parts.segments import stretches
from vlmprune.testing.context import make_context


def runs(labels):
    """Stretches of equal labels as [label, first, last]."""
    out, at = [], 0
    for label, group in groupby(labels):
        n = len(list(group))
        out.append([label, at, at + n - 1])
        at += n
    return out


def refined(labels):
    """The longest stretches of each label stay, others join the longer neighbour: (first, last) of the segments."""
    parts = runs(labels)
    longest = {label: max(b - a + 1 for one, a, b in parts if one == label) for label in labels}
    now = list(labels)
    for label, a, b in parts:
        if b - a + 1 < longest[label] or longest[label] == 1:
            now[a : b + 1] = [None] * (b - a + 1)
    while None in now:
        parts = runs(now)
        i = next(i for i, part in enumerate(parts) if part[0] is None)
        sides = [parts[j] for j in (i - 1, i + 1) if 0 <= j < len(parts)]
        best = max((b - a for _, a, b in sides), default=None)
        label = next((one for one, a, b in sides if b - a == best), "all")
        now[parts[i][1] : parts[i][2] + 1] = [label] * (parts[i][2] - parts[i][1] + 1)
    return [(a, b) for _, a, b in runs(now)]


def groups_of(x, policy):
    """``(frame, places, last)`` of every group of a video, lead and moving ones in turn, and of the other still tokens."""
    F, P = len(x), len(x[0])
    labels = slow_peaks([mean(frame) for frame in x], max(1, int(F * policy.segments)), 7)
    groups, others = [], []
    for first, last in refined(labels):
        frames = range(first, last + 1)
        pairs = [(a, b) for a in frames for b in frames if a < b]
        likeness = [sum(cosine(x[a][p], x[b][p]) for a, b in pairs) / max(len(pairs), 1) for p in range(P)]
        calm = [p for p in range(P) if pairs and likeness[p] > policy.tau]
        for f in frames:
            groups.append((f, calm if f == first else [], last))
            groups.append((f, [p for p in range(P) if p not in calm], f))
            others += [(f, p) for p in calm if f > first]
    return groups, others


def video_slowly(x, policy):
    """``{(f, p): row}`` of what stays, and ``{(f, p): group}`` of all."""
    groups, others = groups_of(x, policy)
    sizes, more = [len(places) for _, places, _ in groups], []
    shares = [int(policy.ratio * m) if m > 14 else m for m in sizes]
    if policy.keep is not None:
        K = policy.kept(len(x) * len(x[0]), 1, 0)
        shares = in_turn(sizes, min(K, sum(sizes)))
        more = others[: K - sum(shares)]
    out, of = {place: x[place[0]][place[1]] for place in more}, {}
    for number, ((f, places, last), share) in enumerate(zip(groups, shares, strict=True)):
        rows = [mean([x[t][p] for t in range(f, last + 1) if (t, p) not in more]) for p in places]
        joined = slow_peaks(rows, share, 7) if rows else []
        for i, centre in enumerate(joined):
            if i == centre:
                out[f, places[i]] = mean([row for row, own in zip(rows, joined, strict=True) if own == i])
        of |= {(t, p): number for t in range(f, last + 1) for p in places}
    return out, of


def slow(policy, ctx):
    """Per sample ``{token: row}`` and ``{token: group}``."""
    found = []
    for b, here in enumerate(clips(ctx)):
        tokens, groups = {}, {}
        for number, first, F, P in here:
            x = ctx.hidden[b, first : first + F * P].double().view(F, P, -1).tolist()
            made, of = video_slowly(x, policy)
            tokens |= {first + f * P + p: row for (f, p), row in made.items()}
            groups |= {first + f * P + p: (number, group) for (f, p), group in of.items()}
        found.append((tokens, groups))
    return found


VIDEOS = [[(8,)], [(9, 1), (), (3,)], [(1,), (4, 5)]]


@pytest.mark.parametrize("videos", VIDEOS, ids=str)
@pytest.mark.parametrize("keep", [None, 1, 20, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("seed", range(2))
def test_equals_the_formula(videos, keep, seed):
    ctx = film(videos, grid=((4, 5), (2, 6))[seed], seed=seed)
    policy = PruneVid(keep=keep, tau=(0.5, 0.7)[seed], ratio=(0.5, 0.4)[seed])
    got, want = policy.select(ctx), slow(policy, ctx)
    assert kept_lists(got.index) == [sorted(tokens) for tokens, _ in want]
    for b, (tokens, _) in enumerate(want):
        rows = [tokens[i] for i in sorted(tokens)]
        if rows:
            torch.testing.assert_close(got.hidden[b, : len(rows)], torch.tensor(rows), atol=1e-5, rtol=1e-5)
        for i, target in enumerate(got.merged[b].tolist()):
            assert target == -1 or (target in tokens and i not in tokens)


@pytest.mark.parametrize("seed", range(60))
def test_stretches(seed):
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 2 + seed % 4, (3, 5 + seed % 13), generator=g)
    if seed % 2:
        labels = labels.repeat_interleave(2, 1)
    for row, starts in zip(labels.tolist(), stretches(labels).tolist(), strict=True):
        assert [f for f in range(len(row)) if starts[f] or f == 0] == [first for first, _ in refined(row)]


def attention_slowly(made, ctx, b):
    """The most that any head of any text row pays to each visual token: unrotated, over all keys, in double precision."""
    seen = ctx.attention
    H, shared = made.query.shape[1], made.query.shape[1] // made.key.shape[1]
    first, best = made.key.shape[2] - made.query.shape[2], {}
    for h in range(H):
        for row in (r for r in seen.rows[b].tolist() if r >= 0):
            z = made.key[b, h // shared].double() @ made.query[b, h, row - first].double() * seen.scale
            p = z.masked_fill(~made.valid[b], -torch.inf).softmax(0)
            for j, column in enumerate(c for c in seen.columns[b].tolist() if c >= 0):
                best[j] = max(best.get(j, 0.0), float(p[column]))
    return [round(best[j], 7) for j in range(len(best))]


@pytest.mark.parametrize("keep", [None, 0.5])
@pytest.mark.parametrize("seed", range(2))
def test_the_second_stage_keeps_the_best_of_each_group(keep, seed):
    """What stage 1 has found is remembered among what the stages of a prompt share."""
    policy, ctx = (
        PruneVid(keep=keep, tau=0.5, then=0.4, layer=3),
        film([(6,), (2, 3)], grid=(4, 5), seed=seed),
    )
    kept, want = kept_lists(policy.select(ctx).index), slow(policy, ctx)
    grids = [((4, 5),) * 6, ((4, 5),) * 5]
    made = text_case(grids, layer=3, kept=kept)
    later = replace(made.ctx, shared=ctx.shared, sizes=ctx.sizes)
    got = kept_lists(policy.select(later))
    for b, own in enumerate(kept):
        scores, groups = attention_slowly(made, later, b), {}
        for j, ordinal in enumerate(own):
            groups.setdefault(want[b][1][ordinal], []).append(j)
        sizes = [len(groups[key]) for key in sorted(groups)]
        shares = (
            [int(0.4 * m) for m in sizes] if keep is None else in_turn(sizes, policy.kept(len(own), 1, 3))
        )
        expected = []
        for key, share in zip(sorted(groups), shares, strict=True):
            expected += [groups[key][i] for i in top([scores[j] for j in groups[key]], share)]
        assert got[b] == sorted(expected)


@pytest.mark.parametrize("few_values", [False, True])
def test_alone_the_second_stage_has_one_group(few_values):
    made = text_case(["tall", "none", "square"], few_values, layer=11)
    got = kept_lists(PruneVid().select(made.ctx))
    for b, n in enumerate(made.ctx.counts):
        want = top(attention_slowly(made, made.ctx, b), int(0.4 * n)) if n else []
        assert got[b] == want


def test_one_of_a_sample_stays_at_least():
    ctx = make_context(PruneVid().needs(11), [[(1, 2)]], 11)
    assert PruneVid().select(ctx).shape == (1, 1)


def test_an_image_is_one_moving_frame():
    ctx = film([(1,)], grid=(4, 5))
    got, rows = PruneVid().select(ctx), ctx.hidden[0].double().tolist()
    joined = slow_peaks(rows, 10, 7)
    assert got.index.tolist() == [sorted(set(joined))]
    assert PruneVid().select(film([(1,)], grid=(2, 7))).index.tolist() == [list(range(14))]


def test_counts_needs_and_no_images():
    assert PruneVid().select(film([(), ()])).shape == (2, 0)
    assert PruneVid().fixed_count is False and PruneVid(keep=0.3).fixed_count
    assert PruneVid().layers == (0, 11)
    assert PruneVid().needs(0) == Needs(hidden=True)
    assert PruneVid().needs(11) == Needs(attention="previous", rows="text")
    assert [PruneVid().kept(100, 1, layer) for layer in (0, 11)] == [50, 40]
    assert PruneVid().at(0.25) == PruneVid(keep=0.25, then=0.25)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"ratio": 2}, r"^ratio: expected a share in \(0, 1\] as a float \(1.0 is everything\), got 2$"),
        ({"then": 4}, r"^then: expected a share in \(0, 1\] as a float \(1.0 is everything\), got 4$"),
        (
            {"layer": 0},
            r"^layer: expected a whole number >= 1 \(the score comes from the layer before\), got 0$",
        ),
        ({"tau": None}, r"^tau: expected a number, got None$"),
        ({"segments": -1}, r"^segments: expected a share in \[0, 1\], got -1$"),
        (
            {"keep": 0},
            r"^keep: expected a share in \(0, 1\] or a whole number of tokens per image >= 1, got 0$",
        ),
        ({"positions": "own"}, r"^positions: expected 'keep' or 'pack', got 'own'$"),
    ],
)
def test_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        PruneVid(**settings)
