"""VisPruner against its formula, patch by patch; rounds with an odd number of patches too."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers.contexts import images_in, kept_lists, patch_scores, sight
from vlmprune.policies.base import Needs
from vlmprune.policies.methods.vispruner import VisPruner, remove_duplicates

BATCHES = [
    pytest.param({"images": ["square"]}, id="one"),
    pytest.param({"images": ["tall", "none", ((3, 7), (7, 3))]}, id="ragged-odd"),
    pytest.param({"images": ["square"], "few_values": True}, id="ties"),
    pytest.param({"images": [((9, 9),)], "cls": False}, id="many-rounds-no-cls"),
]


def slow_rounds(features, rest, keep):
    """Thin a list of patches: the first, third, ... against the second, fourth, ..., at most 8 a round."""
    x = features.double().cpu().numpy()
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    cosine, rounds = (x @ x.T).round(12), 0
    while keep and len(rest) > keep:
        even, odd = rest[0::2], rest[1::2]
        likest = {e: cosine[e, odd].max() for e in even}
        even = sorted(even, key=lambda e: -likest[e])[min(8, len(rest) - keep, len(even)) :]
        rest, rounds = even + odd, rounds + 1
    return rest[:keep], rounds


def slow(scores, features, keep, ratio):
    order = sorted(range(len(scores)), key=lambda j: (-scores[j], j))
    important = int(keep * ratio)
    return sorted(order[:important] + slow_rounds(features, order[important:], keep - important)[0])


@pytest.mark.parametrize("settings", BATCHES)
@pytest.mark.parametrize("keep, ratio", [(8, 0.5), (7, 0.5), (0.3, 0.25), (1, 0.0), (5, 1.0), (100, 0.5)])
def test_equals_the_formula(settings, keep, ratio):
    ctx = sight(**settings)
    got = VisPruner(keep, ratio, positions="pack").select(ctx)
    for sample, here in enumerate(images_in(ctx)):
        expected = []
        for number, first, (r, c) in here:
            count = min(r * c, keep) if isinstance(keep, int) else max(1, int(keep * r * c))
            scores = patch_scores(ctx, -2, number)
            expected += [first + p for p in slow(scores, ctx.features[number], count, ratio)]
        assert kept_lists(got.index)[sample] == expected


def test_equal_features():
    """Every patch duplicates every other: the earliest even places go, by order alone."""
    ctx = sight(["square"])
    axis = torch.zeros_like(ctx.features)
    axis[..., 3] = 2.0  # cosines are exactly 1
    same = replace(ctx, features=axis)
    expected = slow(patch_scores(ctx, -2, 0), axis[0], 10, 0.5)
    assert VisPruner(10, positions="pack").select(same).index.tolist() == [expected]


def test_a_duplicate_goes_before_a_patch_of_its_own():
    """Four patches by attention; 0 and 1 are equal, 2 is alone: one round removes 0."""
    features = torch.tensor([[[1.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]])
    assert remove_duplicates(features, torch.arange(4)[None], 3).tolist() == [[2, 1, 3]]


def test_a_round_removes_no_more_than_there_are():
    """Ten patches to one: the first round may remove 8 but has 5 even ones."""
    features = torch.randn(1, 10, 4, generator=torch.Generator().manual_seed(0))
    assert remove_duplicates(features, torch.arange(10)[None], 1).shape == (1, 1)
    assert remove_duplicates(features, torch.arange(10)[None], 0).shape == (1, 0)


def test_published_counts():
    ctx = sight([((24, 24),)])
    assert VisPruner(positions="pack").select(ctx).index.shape == (1, 64)
    order = list(range(576))
    assert slow_rounds(ctx.features[0], order[32:], 32)[1] == 64  # 544 - 32 = 512 = 64 rounds of 8


def test_no_images():
    assert VisPruner(positions="pack").select(sight(["none"])).shape == (1, 0)


def test_needs():
    assert VisPruner(positions="pack").layers == (0,) and VisPruner(positions="pack").needs(0) == Needs(
        vision=(-2,)
    )


def test_missing_features():
    with pytest.raises(
        ValueError, match=r"^ctx\.features: expected what the projector got \(declare .*None$"
    ):
        VisPruner(positions="pack").select(replace(sight(["square"]), features=None))


@pytest.mark.parametrize("ratio", [-0.1, 1.5, "half", True, float("nan")])
def test_rejects(ratio):
    with pytest.raises(ValueError, match=r"^important_ratio: expected a share in \[0, 1\], got "):
        VisPruner(important_ratio=ratio, positions="pack")
