"""VisionTrim against loops over patches and words in double precision."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from helpers.contexts import images_in, patch_scores, sight
from helpers.folds import cosine, projected_sight
from vlmprune.policies import VisionTrim
from vlmprune.policies.base import Needs
from vlmprune.policies.counts import keep_count
from vlmprune.policies.parts.affinity import local_affinity

BATCHES = [
    pytest.param({"images": ["square"]}, id="one"),
    pytest.param({"images": ["tall", "none", ((3, 7), (7, 3))]}, id="ragged"),
    pytest.param({"images": ["square", "square"], "cls": False}, id="no-cls"),
    pytest.param({"images": [((1, 12),)]}, id="one row"),
]
SETTINGS = [
    dict(keep=12),
    dict(keep=0.5, text_ratio=0.4, window=5),
    dict(keep=9, score="received"),
    dict(keep=1),
    dict(keep=4, text_ratio=1.0, rounds=1),
    dict(keep=1000, text_ratio=0.5),
    dict(keep=7, text_ratio=0.0),
]


def softmax(x):
    e = np.exp(np.array(x) - max(x))
    return e / e.sum()


def affinity_slowly(rows, grid, window=3):
    """Mean over the places around each that are there of minus squared distances, by features and half by place."""
    places = np.array([*product(range(grid[0]), range(grid[1]))], dtype=float)
    found = []
    for here, row in zip(places, rows, strict=True):
        near = [i for i, there in enumerate(places) if np.abs(here - there).max() <= window // 2]
        parts = [
            ((row - rows[i]) ** 2).sum() / rows.var(ddof=1)
            + ((here - places[i]) ** 2).sum() / places.var(ddof=1) / 2
            for i in near
        ]
        found.append(-sum(parts) / len(parts))
    return np.array(found)


def from_others_slowly(seen, image):
    """Attention that each patch receives from all other patches, head mean, softmaxes over CLS too."""
    query, key = (x[image].double().cpu().numpy() for x in (seen.query, seen.key))
    total = np.zeros(key.shape[1])
    for q, k in zip(query, key, strict=True):
        for i in range(int(seen.cls), len(k)):
            share = softmax(k @ q[i] * seen.scale)
            share[i] = 0
            total += share / len(query)
    return total[int(seen.cls) :]


def dominance(ctx, image, grid, score="local", window=3):
    cls = np.array(patch_scores(ctx, -2, image))
    if score == "received":
        other = from_others_slowly(ctx.vision[-2], image)
        return cls / np.linalg.norm(cls) + other / np.linalg.norm(other)
    seen = softmax(cls)
    near = softmax(affinity_slowly(ctx.features[image].double().cpu().numpy(), grid, window))
    share = near.var(ddof=1) / (seen.var(ddof=1) + near.var(ddof=1))
    return share * seen + (1 - share) * near


def trimmed_slowly(ctx, sample, image, first, grid, keep, text_ratio=0.25, rounds=3, **how):
    """Places, rows and which place the others were merged into, dominant ones first."""
    n = grid[0] * grid[1]
    kept = keep_count(keep, n)
    centres = min(int(kept * text_ratio + 1e-6), kept - 1)
    worth = dominance(ctx, image, grid, **how)
    order = sorted(range(n), key=lambda j: (-worth[j], j))
    dominant = sorted(order[: kept - centres])
    left = [j for j in range(n) if j not in dominant]
    words = ctx.embeds[sample, [t for t in ctx.text[sample].tolist() if t >= 0]].double().cpu().numpy()
    own = ctx.hidden[sample, first : first + n].double().cpu().numpy()
    v = ctx.features[image].double().cpu().numpy()
    said = {j: sum(cosine(own[j], word) for word in words) for j in left}
    found = sorted(sorted(left, key=lambda j: (-round(said[j], 7), j))[:centres])
    rest, moved, rows, into = (
        [j for j in left if j not in found],
        {j: v[j] for j in found},
        dict(enumerate(own)),
        {},
    )
    for _ in range(rounds if rest and found else 0):
        for i in rest:
            ties = [sum(cosine(own[i], w) * cosine(rows[j], w) for w in words) for j in found]
            if not len(words):
                ties = [cosine(own[i], rows[j]) for j in found]
            into[i] = found[int(np.argmax(np.round(ties, 7)))]
        for j in found:
            joins = [v[i] for i in rest if into[i] == j]
            moved[j] = moved[j] + (np.mean(joins, 0) if joins else 0)
            rows[j] = ctx.project(torch.from_numpy(moved[j]).float()).double().cpu().numpy()
    places = dominant + found
    return (
        [first + j for j in places],
        [rows[j] for j in places],
        {first + i: first + j for i, j in into.items()},
    )


def assert_trimmed(policy, ctx, **settings):
    got = policy.select(ctx)
    for sample, here in enumerate(images_in(ctx)):
        tokens, into = [], {}
        for image, first, grid in here:
            places, rows, joined = trimmed_slowly(ctx, sample, image, first, grid, **settings)
            tokens += zip(places, rows, strict=True)
            into |= joined
        if policy.positions == "keep":
            tokens.sort(key=lambda token: token[0])
        index = got.index[sample].tolist()
        assert index == [place for place, _ in tokens] + [-1] * (len(index) - len(tokens))
        for row, (_, wanted) in zip(got.hidden[sample].double().cpu().numpy(), tokens, strict=False):
            np.testing.assert_allclose(row, wanted, atol=1e-5)
        merged = got.merged[sample].tolist()
        assert merged == [into.get(j, -1) for j in range(len(merged))]


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("positions", ["keep", "pack"])
def test_equals_the_formula(batch, settings, positions):
    ctx = projected_sight(**batch)
    assert_trimmed(VisionTrim(**settings, positions=positions), ctx, **settings)


@pytest.mark.parametrize("grid, window", [((6, 6), 3), ((2, 9), 5), ((1, 1), 3), ((5, 3), 1), ((3, 3), 9)])
def test_affinity(grid, window):
    rows = torch.randn(2, grid[0] * grid[1], 5, generator=torch.Generator().manual_seed(0))
    got = local_affinity(rows, grid, window)
    for one, own in zip(got, rows, strict=True):
        if grid == (1, 1):
            assert one.tolist() == [0.0]
        else:
            wanted = affinity_slowly(own.double().cpu().numpy(), grid, window)
            torch.testing.assert_close(one, torch.from_numpy(wanted), rtol=1e-5, atol=1e-5)


def test_affinity_of_an_image_of_one_colour_is_that_of_places():
    flat = local_affinity(torch.ones(1, 9, 4), (3, 3), 3)
    assert torch.isfinite(flat).all() and flat[0, 0] == flat[0, 8] and flat[0, 1] == flat[0, 3]


def test_without_text_the_first_are_centres_of_those_like_them():
    ctx = projected_sight(["square"])
    ctx = replace(ctx, text=ctx.text[:, :0], words=(0,))
    assert_trimmed(VisionTrim(keep=8), ctx, keep=8)


def test_equal_patches_keep_the_first():
    ctx = sight()
    seen = ctx.vision[-2]
    flat = {-2: replace(seen, key=torch.ones_like(seen.key))}
    ctx = replace(
        ctx, vision=flat, features=torch.ones_like(ctx.features), hidden=torch.ones_like(ctx.hidden)
    )
    got = VisionTrim(keep=4, text_ratio=0.5, score="received").select(ctx)
    assert got.index.tolist() == [[0, 1, 2, 3]] and got.merged[0].tolist() == [-1] * 4 + [2] * 32


def test_needs_and_counts():
    assert VisionTrim().needs(0) == Needs(hidden=True, embeds=True, vision=(-2,))
    assert VisionTrim(text_ratio=0.0).needs(0) == Needs(hidden=True, vision=(-2,))
    assert VisionTrim().kept(576, 1, 0) == 64


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"keep": 0}, "keep: expected a share in (0, 1] or a whole number of tokens per image >= 1, got 0"),
        ({"text_ratio": 1.5}, "text_ratio: expected a share in [0, 1], got 1.5"),
        ({"score": "cls"}, "score: expected 'local' or 'received', got 'cls'"),
        ({"window": 0}, "window: expected a whole number >= 1, got 0"),
        ({"window": 4}, "window: expected an odd number, got 4"),
        ({"rounds": 0}, "rounds: expected a whole number >= 1, got 0"),
        ({"vision_layer": 0.5}, "vision_layer: expected a whole number, got 0.5"),
        ({"positions": "own"}, "positions: expected 'keep' or 'pack', got 'own'"),
    ],
)
def test_settings(settings, said):
    with pytest.raises(ValueError) as error:
        VisionTrim(**settings)
    assert str(error.value) == said
