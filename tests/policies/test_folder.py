"""FOLDER against rounds of matching written out, in the tower's features and of projected rows."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers.contexts import case, images_in, patch_scores
from helpers.folds import assert_folded, fold_slowly, projected_sight
from vlmprune.policies import Folder
from vlmprune.policies.base import Needs
from vlmprune.policies.counts import keep_count

BATCHES = [
    pytest.param({"images": ["square"]}, id="one"),
    pytest.param({"images": ["tall", "none", ((3, 7), (7, 3))]}, id="ragged"),
    pytest.param({"images": ["square"], "few_values": True}, id="ties"),
    pytest.param({"images": ["square", "square"], "cls": False}, id="no-cls"),
]


def folded_in_tower(ctx, keep, alpha):
    """Per sample, the tokens of its images."""
    for here in images_in(ctx):
        found = []
        for number, first, _ in here:
            seen = ctx.vision[-2]
            keys = seen.key[number, :, int(seen.cls) :].double().mean(0).cpu().numpy()
            features = ctx.features[number].double().cpu().numpy()
            penalty = [100 * alpha * score for score in patch_scores(ctx, -2, number)]
            how = {"first": 0, "spare": 0} if seen.cls else {"first": 1, "spare": 1}
            count = keep_count(keep, len(features))
            tokens = fold_slowly(keys, features, count, weighted=True, penalty=penalty, **how)
            found += [(first, token) for token in tokens]
        yield found


@pytest.mark.parametrize("settings", BATCHES)
@pytest.mark.parametrize("keep", [12, 0.7, 1, 1000])
def test_equals_the_formula_in_the_tower(settings, keep):
    ctx = projected_sight(**settings)
    got = Folder(keep=keep, positions="pack").select(ctx)
    assert got.positions == "pack"
    for sample, expected in enumerate(folded_in_tower(ctx, keep, 5.0)):
        assert_folded(
            got, sample, expected, lambda t: ctx.project(torch.from_numpy(t.row)).double().cpu().numpy()
        )


@pytest.mark.parametrize("alpha", [0, 0.3])
def test_alpha_weighs_attention(alpha):
    ctx = projected_sight(["square", "square"])
    got = Folder(keep=0.8, alpha=alpha, positions="keep").select(ctx)
    assert got.positions == "keep"
    for sample, expected in enumerate(folded_in_tower(ctx, 0.8, alpha)):
        assert got.index[sample, : len(expected)].tolist() == [first + t.place for first, t in expected]


def test_what_cls_looks_at_stays():
    """All patches are alike; CLS looks at three of the places that merge. With nothing to weigh the first would merge."""
    ctx = projected_sight(["square"])
    seen = ctx.vision[-2]
    key = torch.ones_like(seen.key)
    key[:, :, [1 + 1, 1 + 5, 1 + 21]] += 0.01
    query = seen.query.clone()
    query[:, :, 0] = 100.0
    ctx = replace(ctx, vision={-2: replace(seen, key=key, query=query)})
    kept = Folder(keep=33, positions="pack").select(ctx).index[0].tolist()
    assert sorted(set(range(36)) - set(kept)) == [3, 7, 9]
    assert sorted(
        set(range(36)) - set(Folder(keep=33, alpha=0, positions="pack").select(ctx).index[0].tolist())
    ) != [3, 7, 9]


def assert_projected(ctx, keep):
    """Rows that stand for m tokens are 1 + log m times as loud."""
    got = Folder(keep=keep, place="projected", positions="pack").select(ctx)
    for sample, here in enumerate(images_in(ctx)):
        found = []
        for _, first, (rows, columns) in here:
            n = rows * columns
            own = ctx.hidden[sample, first : first + n].double().cpu().numpy()
            tokens = fold_slowly(own, own, keep_count(keep, n), spare=1, weighted=True)
            found += [(first, token) for token in tokens]
        assert_folded(got, sample, found, lambda t: t.row * (1 + np.log(t.size)))


@pytest.mark.parametrize("keep", [30, 11, 0.2, 1])
def test_equals_the_formula_of_projected_rows(keep):
    """Images of several sizes in one batch."""
    assert_projected(case(["square", "none", "two"], layer=0, seed=3).ctx, keep)


def test_ties_go_to_the_first():
    """Rows along three axes, some of them zero: cosines of exactly 0 and 1."""
    ctx = case(["square", "none", "two"], layer=0).ctx
    axis = torch.randint(4, ctx.mask.shape, generator=torch.Generator().manual_seed(1))
    axes = torch.eye(4, ctx.hidden.shape[2])
    axes[3] = 0
    assert_projected(replace(ctx, hidden=axes[axis]), 0.6)


def test_doubles_become_one():
    """Half of 36 tokens in pairs leaves every pair once, as it is but for the loudness."""
    ctx = case(["square"], layer=0).ctx
    pairs = torch.randn(1, 18, ctx.hidden.shape[2], generator=torch.Generator().manual_seed(0))
    ctx = replace(ctx, hidden=pairs.repeat_interleave(2, 1))
    got = Folder(keep=0.5, place="projected", positions="pack").select(ctx)
    torch.testing.assert_close(got.hidden, pairs * (1 + torch.tensor(2.0).log()))


def test_what_stays_alone_is_not_touched():
    """Not projected anew, nor scaled, to the bit; in half precision too."""
    for ctx in (
        projected_sight(["square"]),
        replace(projected_sight(["square"]), hidden=projected_sight(["square"]).hidden.bfloat16()),
    ):
        for place in ("tower", "projected"):
            got = Folder(keep=30, place=place, positions="pack").select(ctx)
            alone = [i for i, at in enumerate(got.index[0].tolist()) if at not in got.merged[0].tolist()]
            assert len(alone) >= 24
            assert torch.equal(got.hidden[0, alone], ctx.hidden[0, got.index[0, alone]])


def test_needs():
    assert Folder(positions="pack").needs(0) == Needs(hidden=True, vision=(-2,))
    assert Folder(place="projected", positions="pack").needs(0) == Needs(hidden=True)


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"keep": 0}, "keep: expected a share in (0, 1] or a whole number of tokens per image >= 1, got 0"),
        ({"place": "llm"}, "place: expected 'tower' or 'projected', got 'llm'"),
        ({"alpha": -1}, "alpha: expected a number >= 0, got -1"),
        ({"alpha": float("nan")}, "alpha: expected a number >= 0, got nan"),
        ({"vision_layer": 0.5}, "vision_layer: expected a whole number, got 0.5"),
        ({"positions": "own"}, "positions: expected 'keep' or 'pack', got 'own'"),
    ],
)
def test_settings(settings, said):
    with pytest.raises(ValueError) as error:
        Folder(**settings)
    assert str(error.value) == said
