"""DivPrune against its formula: greedy max-min cosine distance, chosen tokens masked."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers.contexts import case, kept_lists
from vlmprune.policies.base import Needs, Reduction
from vlmprune.policies.methods.divprune import DivPrune

BATCHES = [["square"], ["two", "none", "tall"], ["two", "square"], [((1, 1),)], ["none", "none"]]


def slow(features, count):
    """Loops over a distance table in double precision; ties to the lower number."""
    x = features.double().cpu().numpy()
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-30)
    far = np.round(1 - x @ x.T, 6)
    n, chosen = len(x), []
    while len(chosen) < count:
        best, value = None, -1.0
        for j in range(n):
            rivals = chosen or [i for i in range(n) if i != j]
            gap = min((far[i, j] for i in rivals), default=9.0)
            if j not in chosen and gap > value:
                best, value = j, gap
        chosen.append(best)
    return sorted(chosen)


def count_of(keep, tokens, images):
    wanted = keep * images if isinstance(keep, int) else max(1, round(keep * tokens))
    return min(tokens, wanted)


@pytest.mark.parametrize("images", BATCHES)
@pytest.mark.parametrize("keep", [0.098, 0.5, 1.0, 4, 100])
def test_equals_the_formula(images, keep):
    ctx = case(images, layer=0).ctx
    got = DivPrune(keep, positions="pack").select(ctx)
    for sample, n in enumerate(ctx.counts):
        expected = slow(ctx.hidden[sample, :n], count_of(keep, n, len(ctx.grids[sample])))
        assert kept_lists(got.index)[sample] == expected
    assert got == Reduction(got.index, None, "pack")


@pytest.mark.parametrize("keep", [3, 7, 20])
def test_duplicates_are_kept_once_until_nothing_else_is_left(keep):
    """24 tokens along 6 axes, of several lengths: cosines are exactly 0 or 1."""
    ctx = case([((4, 6),)], layer=0).ctx
    g = torch.Generator().manual_seed(3)
    axis = torch.randint(6, (24,), generator=g)
    hidden = (torch.eye(8)[axis] * (1 + torch.arange(24)[:, None] % 3))[None]
    kept = kept_lists(DivPrune(keep, positions="pack").select(replace(ctx, hidden=hidden)).index)[0]
    assert kept == slow(hidden[0], keep) and len(set(kept)) == keep
    assert len({int(axis[i]) for i in kept}) == min(keep, len(set(axis.tolist())))


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_constant_features_keep_the_first(value):
    ctx = case(["square"], layer=0).ctx
    constant = torch.zeros_like(ctx.hidden)
    constant[..., 0] = value
    assert DivPrune(5, positions="pack").select(replace(ctx, hidden=constant)).index.tolist() == [
        [0, 1, 2, 3, 4]
    ]


def test_images_of_a_sample_are_chosen_from_together():
    """Two equal images: the second adds nothing, so it gets few tokens or none."""
    ctx = case([((3, 4), (3, 4))], layer=0).ctx
    twice = torch.cat([ctx.hidden[:, :12], ctx.hidden[:, :12]], 1)
    kept = kept_lists(DivPrune(4, positions="pack").select(replace(ctx, hidden=twice)).index)[0]
    assert len(kept) == 8 and len({i % 12 for i in kept}) == 8


@pytest.mark.parametrize("keep, count", [(0.098, 56), (192, 192), (128, 128), (64, 64)])
def test_published_counts(keep, count):
    kept = DivPrune(keep, positions="keep").select(case([((24, 24),)], layer=0, last_only=True).ctx)
    assert kept.shape == (1, count)


def test_needs():
    assert DivPrune(positions="pack").layers == (0,) and DivPrune(positions="pack").needs(0) == Needs(
        hidden=True
    )


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"keep": 1.5}, r"^keep: expected a share in \(0, 1\] .*, got 1\.5$"),
        (
            {"positions": "kept"},
            r"^positions: expected 'keep' or 'pack', got 'kept' \(did you mean 'keep'\?\)$",
        ),
    ],
)
def test_rejects(settings, message):
    with pytest.raises(ValueError, match=message):
        DivPrune(**settings)


def test_missing_features():
    with pytest.raises(ValueError, match=r"^ctx\.hidden: expected hidden states .*, got None$"):
        DivPrune(positions="pack").select(replace(case(layer=0).ctx, hidden=None))
