"""PruMerge and PruMerge+ against loops over patches in double precision, by number and by outliers."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers.contexts import images_in
from helpers.folds import cosine, projected_sight
from vlmprune.policies import PruMerge
from vlmprune.policies.base import Crop, Needs
from vlmprune.policies.counts import keep_count
from vlmprune.policies.groups import places_of

BATCHES = [
    pytest.param({"images": ["square"]}, id="one"),
    pytest.param({"images": ["tall", "none", ((3, 7), (7, 3))]}, id="ragged"),
    pytest.param({"images": ["square", "square"], "cls": False}, id="no-cls"),
]
SETTINGS = [
    dict(keep=12),
    dict(keep=0.7, neighbours=3),
    dict(keep=1),
    dict(keep=2, neighbours=0),
    dict(keep=13, plus=True),
    dict(keep=0.4, plus=True, neighbours=5),
    dict(keep=1.0, adaptive=True),
    dict(keep=4, adaptive=True),
    dict(keep=1.0, adaptive=True, plus=True),
    dict(keep=9, adaptive=True, plus=True),
]


def side_by_side(x, image):
    """All heads of every row: ``[rows, H D]``."""
    return np.concatenate([head.numpy() for head in x[image].double().cpu()], 1)


def attention_of_one_head(seen, image):
    query, key = (side_by_side(x, image) for x in (seen.query, seen.key))
    total = np.zeros(len(key))
    rows = query[:1] if seen.cls else query
    for row in rows:
        weight = [np.exp(row @ other / len(row) ** 0.5) for other in key]
        total += np.array(weight) / sum(weight) / len(rows)
    return total[int(seen.cls) :]


def chosen_slowly(paid, kept, plus=False, adaptive=False):
    """Places in the order in which they are found, without the one for the rest."""
    n, most = len(paid), kept - (kept > 1)
    best = sorted(range(n), key=lambda j: -round(paid[j], 9))
    if adaptive:
        low, high = np.percentile(paid, [25, 75])
        count = max(1, sum(x > high + 1.5 * (high - low) for x in paid))
        step = max(1, n // count // 3)
        found = best[:count] + ([j for j in range(0, n, step) if j not in best[:count]] if plus else [])
        return found[:most]
    spread = [(2 * i + 1) * n // (2 * (most // 2)) for i in range(most // 2)] if plus else []
    first = best[: most - len(spread)]
    found = first + [j for j in spread if j not in first]
    return (found + [j for j in best if j not in found])[:most]


def merged_slowly(ctx, keep, image, neighbours=32, layer=-1, **how):
    """Places and features of what is left of an image; the last one is the rest."""
    seen, rows = ctx.vision[layer], ctx.features[image].double().cpu().numpy()
    paid, keys = attention_of_one_head(seen, image), side_by_side(seen.key, image)[int(seen.cls) :]
    n = len(rows)
    kept = keep_count(keep, n)
    found, made = chosen_slowly(paid, kept, **how), []
    for i in found:
        others = sorted(
            (j for j in range(n) if j != i), key=lambda j: (-round(cosine(keys[i], keys[j]), 6), j)
        )
        made.append(rows[i] + sum((paid[j] * rows[j] for j in others[:neighbours]), np.zeros(rows.shape[1])))
    gone = [j for j in range(n) if j not in found]
    if kept > 1:
        found.append(gone[-1])
        made.append(sum(paid[j] * rows[j] for j in gone))
    return found, made


def assert_merged(ctx, settings, positions):
    got, how = PruMerge(**settings, positions=positions).select(ctx), dict(settings)
    assert got.positions == positions
    keep = how.pop("keep")
    for sample, here in enumerate(images_in(ctx)):
        tokens = []
        for image, first, _ in here:
            some = list(zip(*merged_slowly(ctx, keep, image, **how), strict=True))
            tokens += [(first + place, row) for place, row in some]
        if positions == "keep":
            tokens.sort(key=lambda token: token[0])
        index = got.index[sample].tolist()
        assert index == [place for place, _ in tokens] + [-1] * (len(index) - len(tokens))
        for row, (_, wanted) in zip(got.hidden[sample], tokens, strict=False):
            torch.testing.assert_close(
                row, ctx.project(torch.from_numpy(wanted)).to(row), atol=1e-5, rtol=1e-5
            )


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("positions", ["keep", "pack"])
def test_equals_the_formula(batch, settings, positions):
    assert_merged(projected_sight(**batch, layers=(-1,)), settings, positions)


def with_attention(ctx, paid):
    """The same with CLS's attention in proportion to ``paid`` (CLS gets none of it)."""
    seen = ctx.vision[-1]
    query, key = torch.zeros_like(seen.query), seen.key.clone()
    scale = (key.shape[1] * key.shape[3]) ** 0.5
    key[:, 0, :, 0] = torch.cat([torch.tensor([1e-9]), paid]).log() * scale
    query[:, 0, 0, 0] = 1.0
    return replace(ctx, vision={-1: replace(seen, query=query, key=key)})


def test_outliers_decide_how_many_stay():
    """Of 36 patches alike but for three; a smaller ``keep`` caps, a number has no say."""
    paid = torch.ones(36) + torch.arange(36) / 100
    paid[[5, 17, 30]] = torch.tensor([5.0, 4.0, 6.0])
    ctx = with_attention(projected_sight(["square"], layers=(-1,)), paid)
    assert PruMerge(keep=1.0, adaptive=True).select(ctx).index.tolist() == [[5, 17, 30, 35]]
    assert PruMerge(keep=1.0, adaptive=True, positions="pack").select(ctx).index.tolist() == [[30, 5, 17, 35]]
    assert PruMerge(keep=3, adaptive=True).select(ctx).index.tolist() == [[5, 30, 35]]
    spaced = PruMerge(keep=1.0, adaptive=True, plus=True).select(ctx).index[0].tolist()
    assert spaced == sorted({5, 17, 30, 35, *range(0, 36, 4)})  # every floor(36 / 3 / 3)-th


def test_an_image_without_outliers_keeps_its_best():
    ctx = with_attention(projected_sight(["square"], layers=(-1,)), torch.ones(36) + torch.arange(36) / 100)
    assert PruMerge(keep=1.0, adaptive=True).select(ctx).index.tolist() == [[34, 35]]
    assert PruMerge(keep=1.0, adaptive=True, plus=True).select(ctx).index[0].tolist() == sorted(
        {*range(0, 36, 12), 34, 35}
    )


def test_images_of_a_batch_count_their_own_outliers():
    ctx = projected_sight(["square", "none", ((6, 6), (6, 6))], layers=(-1,))
    got = PruMerge(keep=1.0, adaptive=True).select(ctx)
    counts = (got.index >= 0).sum(1).tolist()
    alone = [len(merged_slowly(ctx, 1.0, image, adaptive=True)[0]) for image in range(3)]
    assert counts == [alone[0], 0, alone[1] + alone[2]] and got.index.shape[1] == max(counts)


def test_equal_attention_keeps_the_first():
    ctx = with_attention(projected_sight(["square"], layers=(-1,)), torch.ones(36))
    assert PruMerge(keep=5).select(ctx).index.tolist() == [[0, 1, 2, 3, 35]]
    assert PruMerge(keep=5, plus=True).select(ctx).index.tolist() == [[0, 1, 9, 27, 35]]


def test_all_stay_as_they_are():
    ctx = projected_sight(["square"], layers=(-1,))
    got = PruMerge(keep=1.0).select(ctx)
    assert got.index[0].tolist() == list(range(36)) and torch.equal(got.hidden, ctx.hidden)


def test_equal_keys_give_the_first_to_each():
    """All patches are alike, as are CLS's shares of 1 / 37: a kept one gains the first three others."""
    ctx = projected_sight(["square"], layers=(-1,))
    ctx = replace(ctx, vision={-1: replace(ctx.vision[-1], key=torch.ones_like(ctx.vision[-1].key))})
    got, v = PruMerge(keep=3, neighbours=3).select(ctx), ctx.features[0]
    rows = torch.stack([v[0] + v[1:4].sum(0) / 37, v[1] + v[[0, 2, 3]].sum(0) / 37, v[2:].sum(0) / 37])
    assert got.index.tolist() == [[0, 1, 35]]
    torch.testing.assert_close(got.hidden[0], ctx.project(rows))


def test_newlines_stay_by_budget_and_not_by_outliers():
    alone = projected_sight([((6, 5),)], layers=(-1,))
    crop, order = Crop(0, 6, 6, 5), torch.arange(36)[None]
    hidden = torch.full((1, 36, alone.hidden.shape[2]), 7.0)
    hidden[0, places_of(crop)] = alone.hidden[0]
    ctx = replace(
        alone,
        mask=torch.ones(1, 36, dtype=torch.bool),
        counts=(36,),
        ordinals=order,
        positions=order,
        grids=(((6, 6),),),
        crops=(((crop,),),),
        hidden=hidden,
    )
    assert PruMerge(keep=32).select(ctx).index[0].tolist() == sorted([*places_of(crop), 5, 11])
    for plus in (False, True):
        free = PruMerge(keep=1.0, adaptive=True, plus=plus)
        got, want = free.select(ctx), free.select(alone)
        assert got.index[0].tolist() == [places_of(crop)[n] for n in want.index[0].tolist()]
        torch.testing.assert_close(got.hidden, want.hidden)


def test_counts():
    fixed, free = PruMerge(keep=6), PruMerge(keep=6, adaptive=True)
    assert fixed.fixed_count and not free.fixed_count
    assert fixed.kept(20, 1, 0) == free.kept(20, 1, 0) == 6
    assert PruMerge().kept(576, 1, 0) == 72


def test_needs():
    assert PruMerge().needs(0) == Needs(hidden=True, vision=(-1,))
    assert PruMerge(vision_layer=-2, plus=True).needs(0) == Needs(hidden=True, vision=(-2,))


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"keep": 0}, "keep: expected a share in (0, 1] or a whole number of tokens per image >= 1, got 0"),
        ({"plus": 1}, "plus: expected True or False, got 1"),
        ({"adaptive": "iqr"}, "adaptive: expected True or False, got 'iqr'"),
        ({"neighbours": -1}, "neighbours: expected a whole number >= 0, got -1"),
        ({"vision_layer": 0.5}, "vision_layer: expected a whole number, got 0.5"),
        ({"positions": "own"}, "positions: expected 'keep' or 'pack', got 'own'"),
    ],
)
def test_settings(settings, said):
    with pytest.raises(ValueError) as error:
        PruMerge(**settings)
    assert str(error.value) == said
