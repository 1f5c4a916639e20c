"""SparseVLM against its formulas, in plain loops: raters, scores, counts, recycling, merging."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers.contexts import attention_row, text_case, top
from vlmprune.policies.base import Needs, Reduction
from vlmprune.policies.methods.sparsevlm import SparseVLM
from vlmprune.policies.parts.raters import rated, rater_weights, row_attention
from vlmprune.policies.parts.recycle import recycle_counts
from vlmprune.policies.schedule import stage_counts
from vlmprune.testing.context import make_context
from vlmprune.testing.context_changes import broken

CASES = [
    pytest.param({"images": ["square"]}, id="one-image"),
    pytest.param({"images": ["tall"], "stretch": 1.3}, id="stretched-rope"),
    pytest.param({"images": ["two", "none", "tall"]}, id="ragged"),
    pytest.param({"images": ["two", "tall", "two"], "past": True}, id="cached-past"),
    pytest.param({"images": ["square", "two"], "few_values": True}, id="equal-raters"),
    pytest.param({"images": ["two"], "kept": [[0, 3, 7, 20, 21, 22, 30, 34]]}, id="after-a-stage"),
    pytest.param({"images": [((1, 1),), ((1, 2),)]}, id="one-token"),
]


def slow_image(made, sample):
    """Positions of all visual tokens before pruning, by walking the prompt."""
    positions, at = [], 3
    for rows, cols in made.ctx.grids[sample]:
        positions += range(at, at + rows * cols)
        at += rows * cols + 2
    return positions


def slow_raters(made, sample):
    """Numbers of the text rows with r above its mean; all rows if none is."""
    e = made.ctx.embeds[sample].double().cpu().numpy()
    text = [t for t in made.ctx.text[sample].tolist() if t >= 0]
    r = np.zeros(len(text))
    for j in slow_image(made, sample):
        logits = np.array([e[j] @ e[t] for t in text])
        weight = np.exp(logits - logits.max())
        r += weight / weight.sum() / len(slow_image(made, sample))
    r = r.round(9)
    above = [i for i in range(len(text)) if r[i] > r.mean().round(9)]
    return above or list(range(len(text)))


def slow_matrix(made, sample):
    """Head-mean attention of the raters (rows) to the visual tokens (columns)."""
    rows, heads = made.ctx.attention.rows[sample].tolist(), made.ctx.attention.query.shape[1]
    return np.array(
        [
            np.mean([attention_row(made, sample, rows[i], h) for h in range(heads)], 0)
            for i in slow_raters(made, sample)
        ]
    )


def slow_clusters(x, count):
    """Density peaks of ``x [m, D]``: centres best first, and the number of the centre every token joins."""
    m, D = x.shape
    d = np.array([[math.sqrt(((x[i] - x[j]) ** 2).sum() / D) for j in range(m)] for i in range(m)])
    spread = [np.mean(np.sort(d[i])[:count] ** 2) for i in range(m)]
    score = []
    for i in range(m):
        denser = [j for j in range(m) if (spread[j], j) < (spread[i], i)]
        gap = min((d[i, j] for j in denser), default=d.max())
        score.append(math.exp(-spread[i]) * gap)
    centers = sorted(range(m), key=lambda i: (-score[i], i))[:count]
    joins = [min(range(count), key=lambda c: (d[i, centers[c]], c)) for i in range(m)]
    for c, center in enumerate(centers):
        joins[center] = c
    return centers, joins


def slow_recycle(x, scores, kept, merge):
    """Places of kept and merged tokens, their contents, and the place into which each token was merged, -1 = none."""
    pruned = [j for j in range(len(scores)) if j not in kept]
    m = int(len(pruned) * 0.3) + 1 if pruned else 0
    count = int(m / 10) + 1 if m else 0
    pool = [pruned[i] for i in top([scores[j] for j in pruned], m)]
    centers, joins = slow_clusters(x[pool], count) if m else ([], [])
    merged = [x[[pool[i] for i in range(m) if joins[i] == c]] for c in range(count)]
    merged = [rows.mean(0) if merge == "mean" else rows.sum(0) for rows in merged]
    into = [-1] * len(scores)
    for i, j in enumerate(pool):
        into[j] = pool[centers[joins[i]]]
    return kept + [pool[c] for c in centers], [*x[kept], *merged], into


@pytest.mark.parametrize("settings", [case for case in CASES if case.id != "equal-raters"])
@pytest.mark.parametrize("keep, merge", [(4, "mean"), (0.5, "sum"), (12, "mean")])
def test_equals_the_formula(settings, keep, merge):
    made = text_case(**settings, layer=7)
    got = SparseVLM(keep=(1, keep, 1), merge=merge, positions="pack").select(made.ctx)
    assert isinstance(got, Reduction) and got.positions == "pack"
    for sample, n in enumerate(made.ctx.counts):
        index, rows = got.index[sample].tolist(), got.hidden[sample]
        count = int(n * keep) if isinstance(keep, float) else keep * len(made.ctx.grids[sample])
        expected, contents, into = [], [], []
        if n:
            scores = slow_matrix(made, sample).mean(0).round(12)
            x = made.ctx.hidden[sample, :n].double().cpu().numpy()
            kept = top(scores, min(n, max(1, min(count, n - 1))))
            expected, contents, into = slow_recycle(x, scores, kept, merge)
        assert index == expected + [-1] * (len(index) - len(expected))
        for row, content in zip(rows, contents, strict=False):
            np.testing.assert_allclose(row.cpu(), content, rtol=1e-5, atol=1e-6)
        merged = got.merged[sample].tolist()
        assert merged == into + [-1] * (len(merged) - n)
    assert got.index.shape[1] == int((got.index >= 0).sum(1).max())


def test_ties():
    """Three distinct keys: whichever of equal tokens stay (an ulp may tell them apart), no better one goes."""
    made = text_case(["square", "two"], few_values=True, layer=7)
    got = SparseVLM(keep=(1, 6, 1), recycle=False, positions="keep").select(made.ctx)
    for sample, count in enumerate((6, 12)):
        scores = slow_matrix(made, sample).mean(0).round(7)
        assert sorted(scores[got[sample, :count].cpu()]) == sorted(scores[top(scores, count)])


@pytest.mark.parametrize("kind", ["constant", "duplicates"])
def test_degenerate_features(kind):
    made = text_case(["square"], layer=3)
    hidden = torch.ones_like(made.ctx.hidden)
    if kind == "duplicates":
        hidden = made.ctx.hidden[:, torch.arange(36) // 3]
    made = replace(made, ctx=replace(made.ctx, hidden=hidden))
    got = SparseVLM(keep=(3, 1, 1), positions="pack").select(made.ctx)
    scores = slow_matrix(made, 0).mean(0).round(12)
    index, rows, into = slow_recycle(hidden[0].double().cpu().numpy(), scores, top(scores, 3), "mean")
    assert got.index[0].tolist() == index and got.merged[0].tolist() == into
    np.testing.assert_allclose(got.hidden[0].cpu(), np.array(rows), rtol=1e-5)


def test_without_recycling():
    ctx = text_case(["two", "none", "tall"], layer=3).ctx
    packed = SparseVLM(keep=(7, 1, 1), recycle=False, positions="pack").select(ctx)
    assert packed.positions == "pack" and packed.hidden is None
    assert torch.equal(packed.index, SparseVLM(keep=(7, 1, 1), recycle=False, positions="keep").select(ctx))
    recycled = SparseVLM(keep=(7, 1, 1), positions="pack").select(ctx).index
    assert torch.equal(packed.index[0], recycled[0, :14]) and torch.equal(
        packed.index[2, :7], recycled[2, :7]
    )
    assert (packed.index >= 0).sum(1).tolist() == [14, 0, 7]


@pytest.mark.parametrize("settings", CASES)
def test_raters(settings):
    made = text_case(**settings)
    weights = rater_weights(made.ctx)
    for sample, n in enumerate(made.ctx.counts):
        raters = slow_raters(made, sample) if n else []
        assert weights[sample].nonzero().flatten().tolist() == raters


def test_raters_do_not_change_when_tokens_go():
    """The same prompt after a stage that left one token of one image: whole images still vote."""
    before, after = (text_case(["two"], kept=kept) for kept in (None, [[30]]))
    assert torch.equal(rater_weights(before.ctx), rater_weights(after.ctx))


def test_raters_are_found_once_a_prompt():
    """Stages of one prompt share them; a copy with other embeddings does not take them over."""
    ctx = text_case(["two"]).ctx
    first = rater_weights(ctx)
    assert rater_weights(replace(ctx, layer=ctx.layer + 1)) is first
    turned = replace(ctx, embeds=ctx.embeds.flip(1))
    assert not torch.equal(rater_weights(turned), first)
    assert torch.equal(rater_weights(turned), rater_weights(replace(turned, shared={})))
    assert torch.equal(rater_weights(ctx), first)


def test_equal_text_rows_are_all_raters():
    made = text_case(["square"])
    made.ctx.embeds[:, made.ctx.text[0]] = 0.5
    assert rater_weights(made.ctx).tolist() == [[1.0] * 7]


def test_no_text_after_the_image():
    """Nobody can rate: tokens spread over the image stay, or all where the rank decides. Who has text is rated as ever."""
    mixed, alone = text_case(["square", "square"], after=[5, 0]), text_case(["square"], after=[0])
    assert alone.ctx.text.shape == (1, 0)
    policy = SparseVLM(layers=(2,), keep=(9,), recycle=False, positions="keep")
    got, lonely = policy.select(mixed.ctx), policy.select(alone.ctx)
    assert got[0].tolist() == top(slow_matrix(mixed, 0).mean(0).round(12), 9)
    assert got[1].tolist() == lonely[0].tolist()
    assert lonely[0].tolist() == [3, 8, 11, 16, 19, 21, 24, 29, 32]
    for version in ("1.0", "paper"):
        for made, sample in ((mixed, 1), (alone, 0)):
            assert (
                SparseVLM(version=version, positions="pack").select(made.ctx).index[sample] >= 0
            ).sum() == 36
    merged = SparseVLM(layers=(2,), keep=(9,), positions="pack").select(alone.ctx)
    assert merged.index[0, :9].tolist() == lonely[0].tolist() and merged.hidden.isfinite().all()


@pytest.mark.parametrize("kept", [2, 5, 17, 66, 192, 300])
def test_unrated_tokens_are_spread_evenly(kept):
    """At most three gaps between neighbours, none above 2.2 of their mean, for every number kept."""
    blank = torch.zeros(1, 576)
    ctx = replace(make_context(Needs(), [[(24, 24)]], 2), text=torch.empty(1, 0, dtype=torch.int64))
    index = rated(blank, ctx)[0].argsort(descending=True)[:kept].sort().values
    gaps = set(index.diff().tolist())
    assert len(gaps) <= 3 and max(gaps) < 2.2 * 576 / kept
    assert index[0] < 2 * 576 / kept and index[-1] >= 576 - 2 * 576 / kept


@pytest.mark.parametrize("version", ["1.0", "paper"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_unknown_rank_counts_as_full(version, value):
    """NaN in one sample: it loses nothing, and its neighbour what it would have lost."""
    ctx = text_case(["square", "two"], layer=7).ctx
    policy = SparseVLM(version=version, scale=0.5, recycle=False, positions="pack")
    sound, got = policy.select(ctx).index, policy.select(broken(ctx, 1, value)).index
    assert (got[1] >= 0).sum() == ctx.counts[1] > (sound[1] >= 0).sum()
    assert got[0][got[0] >= 0].tolist() == sound[0][sound[0] >= 0].tolist()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_recycling_of_rows_out_of_range(value):
    """Distances that leave float32 choose some centre among the pruned tokens, once each."""
    ctx = text_case(["square", "square"], layer=3).ctx
    policy, bad = SparseVLM(keep=(3, 1, 1), positions="pack"), replace(ctx, hidden=ctx.hidden.clone())
    bad.hidden[1, ::2] = value
    got, sound = policy.select(bad), policy.select(ctx)
    assert torch.equal(got.index[0], sound.index[0]) and torch.equal(got.hidden[0], sound.hidden[0])
    assert got.index[1, :3].tolist() == sound.index[1, :3].tolist()
    assert len(set(got.index[1].tolist())) == got.index.shape[1] and (got.index >= 0).all()


@pytest.mark.parametrize("settings", CASES)
def test_row_attention(settings):
    made = text_case(**settings)
    got = row_attention(made.ctx.attention)
    for sample, n in enumerate(made.ctx.counts):
        for i, row in enumerate(made.ctx.attention.rows[sample].tolist()):
            for h in range(got.shape[1]):
                expected = attention_row(made, sample, row, h) if row >= 0 else [0.0] * n
                np.testing.assert_allclose(got[sample, h, i, :n].cpu(), expected, rtol=1e-4, atol=1e-7)
                assert not got[sample, h, i, n:].any()


@pytest.mark.parametrize(
    "version, scale, bias", [("1.0", 3.0, 2.0), ("1.0", 0.1, 0.0), ("paper", 1.0, 0.0), ("paper", 0.5, 0.0)]
)
@pytest.mark.parametrize("settings", CASES)
def test_counts_by_rank(settings, version, scale, bias):
    made = text_case(**settings, layer=7)
    policy = SparseVLM(version=version, scale=scale, bias=bias, recycle=False, positions="pack")
    kept = (policy.select(made.ctx).index >= 0).sum(1).tolist()
    for sample, n in enumerate(made.ctx.counts):
        if not n:
            assert kept[sample] == 0
            continue
        rank = np.linalg.matrix_rank(slow_matrix(made, sample).astype(np.float32))
        if version == "1.0":
            wanted = n if rank == n else min(int(rank * scale + bias), n - 1)
        else:
            wanted = n - int(scale * (n - rank))
        assert kept[sample] == max(1, wanted)


@pytest.mark.parametrize(
    "tokens, after, mean",
    [
        (192, (309, 204, 113), 206.5),
        (128, (312, 117, 39), 145.4),
        (96, (249, 55, 27), 114.1),
        (64, (82, 32, 18), 82.2),
    ],
)
def test_published_counts(tokens, after, mean):
    """Tokens after each stage for an image of 576, and their mean over the 32 layer inputs of a 7B model."""
    assert stage_counts(SparseVLM(tokens=tokens, positions="pack"), 576) == list(
        zip((3, 7, 16), after, strict=True)
    )
    a, b, c = after
    assert abs((3 * 576 + 4 * a + 9 * b + 16 * c) / 32 - mean) <= 0.05 + 1e-9
    # what its authors print counts each pruning layer by its output
    assert abs((2 * 576 + 4 * a + 9 * b + 17 * c) / 32 - tokens) < 1


@pytest.mark.parametrize(
    "pruned, counts",
    [(0, (0, 0)), (1, (1, 1)), (29, (9, 1)), (30, (10, 2)), (276, (83, 9)), (510, (154, 16))],
)
def test_recycle_counts(pruned, counts):
    assert recycle_counts(pruned) == counts


def test_defaults_of_the_versions():
    assert SparseVLM(version="1.0", positions="pack").layers == (3, 7, 16, 20)
    assert (
        SparseVLM(version="1.0", tokens=128, positions="pack").scale,
        SparseVLM(version="1.0", tokens=128, positions="pack").bias,
    ) == (
        9.0,
        6.0,
    )
    assert (
        SparseVLM(version="paper", positions="pack").scale,
        SparseVLM(version="paper", positions="pack").bias,
    ) == (1.0, 0.0)
    assert SparseVLM(positions="pack").needs(3) == Needs(
        hidden=True, attention="previous", rows="text", embeds=True
    )
    assert not SparseVLM(recycle=False, positions="pack").needs(3).hidden


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"tokens": 100}, r"^tokens: expected one of 192, 128, 96, 64, or an explicit keep, got 100$"),
        (
            {"version": "2.0"},
            r"^version: expected '1\.5', '1\.0' or 'paper', got '2\.0' \(did you mean '1\.0'\?\)$",
        ),
        ({"layers": (0, 7, 16)}, r"^layer: expected a whole number >= 1 \(the score .*\), got 0$"),
        ({"layers": (3, 7)}, r"^keep: expected 2 counts, one per layer, got \(300, 200, 110\)$"),
        ({"keep": (3, 0, 1)}, r"^keep: expected a share in \(0, 1\] or a whole number .*, got 0$"),
        ({"keep": (1.5, 0.5, 0.1)}, r"^keep: expected a share in \(0, 1\] or a whole number .*, got 1\.5$"),
        ({"scale": 2.0}, r"^scale: expected None, and no bias, for version '1\.5', got 2\.0 and None$"),
        (
            {"version": "paper", "keep": (1, 1, 1)},
            r"^keep: expected \(\) for version 'paper', which counts by rank, got",
        ),
        (
            {"version": "1.0", "tokens": 96},
            r"^tokens: expected 192, 128 or 64, or a scale, for version '1\.0', got 96$",
        ),
        ({"version": "1.0", "scale": -1.0}, r"^scale: expected a number > 0, got -1\.0$"),
        ({"merge": "max"}, r"^merge: expected 'mean' or 'sum', got 'max'$"),
        ({"positions": 1}, r"^positions: expected 'keep' or 'pack', got 1$"),
    ],
)
def test_rejects(settings, message):
    with pytest.raises(ValueError, match=message):
        SparseVLM(**settings)


def test_says_what_is_missing():
    ctx = text_case(["square"], layer=3).ctx
    for field, message in (
        ("embeds", "ctx.embeds: expected input"),
        ("text", "ctx.text: expected where"),
        ("hidden", "ctx.hidden: expected hidden"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            SparseVLM(positions="pack").select(replace(ctx, **{field: None}))
