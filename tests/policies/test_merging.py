"""What is dropped, merged into what stays: the mean with the nearest, and targets at equal steps, by plain loops."""

import pytest
import torch

from vlmprune.policies.parts.merging import averaged_with_nearest, merged_targets


def drawn(crops, tokens, width, seed):
    return torch.randn(crops, tokens, width, generator=torch.Generator().manual_seed(seed))


def nearest_slowly(keys, token, among):
    alike = [torch.cosine_similarity(keys[token].double(), keys[t].double(), dim=0).item() for t in among]
    return among[alike.index(max(alike))]


@pytest.mark.parametrize("stays", [[0, 4, 7], [8], [*range(9)]])
def test_the_mean_with_the_nearest(stays):
    rows = drawn(2, 9, 4, seed=0)
    made, into = averaged_with_nearest(rows, torch.tensor([stays, stays]))
    for own, got, merged in zip(rows, made, into.tolist(), strict=True):
        wanted = [-1 if t in stays else nearest_slowly(own, t, stays) for t in range(9)]
        assert merged == wanted
        for place, row in zip(stays, got, strict=True):
            parts = [place, *(t for t, target in enumerate(wanted) if target == place)]
            torch.testing.assert_close(row, own[parts].mean(0))


def test_nothing_stays():
    made, into = averaged_with_nearest(drawn(2, 9, 4, seed=0), torch.empty(2, 0, dtype=torch.int64))
    assert made.shape == (2, 0, 4) and into.tolist() == [[-1] * 9] * 2


@pytest.mark.parametrize(
    "dominant, count, targets",
    [
        ([2, 5], 3, [0, 3, 6]),  # of 0, 1, 3, 4, 6, 7, 8 every second one
        ([2, 5], 4, [0, 1, 3, 4]),
        ([2, 5], 50, [0, 1, 3, 4, 6, 7, 8]),
        ([], 2, [0, 4]),
        ([2, 5], 0, []),
        ([*range(9)], 3, []),
    ],
)
def test_targets_at_equal_steps(dominant, count, targets):
    features, keys = drawn(2, 9, 5, seed=1), drawn(2, 9, 4, seed=2)
    apart = torch.tensor([dominant, dominant], dtype=torch.int64)
    places, made, into = merged_targets(features, keys, apart, count)
    assert places.tolist() == [targets, targets] and made.shape == (2, len(targets), 5)
    for crop in range(2):
        wanted = [-1] * 9
        for t in range(9) if targets else ():
            if t not in dominant and t not in targets:
                wanted[t] = nearest_slowly(keys[crop], t, targets)
        assert into[crop].tolist() == wanted
        for place, row in zip(targets, made[crop], strict=True):
            followers = [t for t, target in enumerate(wanted) if target == place]
            mean = features[crop, followers].mean(0) if followers else 0.0
            torch.testing.assert_close(row, features[crop, place] + mean)
