"""PruneSID against its formula: axes by numpy, groups and shares in loops."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers.contexts import images_in, kept_lists, patch_scores, sight
from vlmprune.policies.base import Needs
from vlmprune.policies.methods.prunesid import PruneSID, kept_of_groups
from vlmprune.policies.parts.apportion import shared_out

BATCHES = [
    pytest.param({"images": ["square"]}, id="one"),
    pytest.param({"images": ["tall", "none", ((3, 7), (7, 3))]}, id="ragged"),
    pytest.param({"images": ["square"], "few_values": True}, id="ties"),
    pytest.param({"images": [((5, 5),)], "cls": False}, id="no-cls"),
]


def count_of(keep, tokens):
    return min(tokens, keep) if isinstance(keep, int) else max(1, int(keep * tokens))


def slow_axes(features, axes, seed):
    """Right singular vectors of sigmoid(features)' within a random subspace, by numpy."""
    A = torch.sigmoid(features.cpu().float()).double().numpy().T
    A = A - A.mean(0)
    turned = A.shape[0] < A.shape[1]
    A = A.T if turned else A
    start = torch.randn(A.shape[1], axes, generator=torch.Generator().manual_seed(seed), device="cpu")
    Q = np.linalg.qr(A @ start.double().numpy())[0]
    for _ in range(2):
        Q = np.linalg.qr(A.T @ Q)[0]
        Q = np.linalg.qr(A @ Q)[0]
    left, _, right = np.linalg.svd(Q.T @ A, full_matrices=False)
    return Q @ left if turned else right.T


def slow_shares(members, standing, keep, budget):
    least = [min(1, c) for c in members]
    most = [min(5 * math.ceil(budget / 64), c, s) for c, s in zip(members, standing, strict=True)]
    while sum(most) < budget:
        most = [min(m + 1, c) for m, c in zip(most, members, strict=True)]
    rest, shares, before, running = keep - sum(least), [], 0, 0
    for s in standing:
        running += s
        end = round(running * rest / sum(standing))
        shares.append(end - before)
        before = end
    stay = [min(a + b, m) for a, b, m in zip(least, shares, most, strict=True)]
    for g in sorted(range(len(members)), key=lambda g: (-standing[g], g)):
        while sum(stay) < keep and stay[g] < most[g]:
            stay[g] += 1
    return stay


def slow(features, scores, keep, seed, budget=None):
    budget = keep if budget is None else budget
    n, groups = len(scores), max(1, budget // 4)
    if keep == n:
        return list(range(n))
    axes = slow_axes(features, min(groups, *features.shape), seed)
    group = [int(np.abs(axes[j]).argmax()) for j in range(n)]
    v = features.double().cpu().numpy()
    v = v / np.linalg.norm(v, axis=1, keepdims=True)
    pairs = [v[i] @ v[j] for i in range(n) for j in range(i)]
    threshold = budget / 32 * sum(pairs) / len(pairs)
    lines = []
    for g in range(groups):
        front, behind = [], []
        for j in sorted((j for j in range(n) if group[j] == g), key=lambda j: (-scores[j], j)):
            (behind if any(v[i] @ v[j] > threshold for i in front) else front).append(j)
        lines.append((front, behind))
    stay = slow_shares([len(a + b) for a, b in lines], [len(a) for a, _ in lines], keep, budget)
    return sorted(j for (a, b), count in zip(lines, stay, strict=True) for j in (a + b)[:count])


@pytest.mark.parametrize("settings", BATCHES)
@pytest.mark.parametrize("keep, seed", [(8, 0), (14, 3), (0.35, 1), (1, 0), (3, 5), (1.0, 0)])
@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_equals_the_formula(settings, keep, seed, shift):
    ctx = sight(**settings)
    ctx = replace(ctx, features=ctx.features + shift)  # so that all are alike, and thresholds matter
    got = PruneSID(keep, seed=seed, positions="pack").select(ctx)
    for sample, here in enumerate(images_in(ctx)):
        expected = []
        for number, first, (r, c) in here:
            scores = patch_scores(ctx, -2, number)
            expected += [first + j for j in slow(ctx.features[number], scores, count_of(keep, r * c), seed)]
        assert kept_lists(got.index)[sample] == expected


@pytest.mark.parametrize("tokens, width", [(30, 50), (60, 24)])
@pytest.mark.parametrize("keep, budget", [(20, 20), (20, 21), (23, 24)])
def test_more_features_than_patches_and_the_reverse(tokens, width, keep, budget):
    g = torch.Generator().manual_seed(0)
    features = torch.randn(1, tokens, width, generator=g).cumsum(1)
    scores = torch.rand(1, tokens, generator=g)
    got = kept_of_groups(features, scores, keep, budget, seed=2)
    assert got.tolist() == [slow(features[0], scores[0].tolist(), keep, 2, budget)]


def test_shares():
    """All of them, on random groups: empty ones, small ones, and such where most have gone behind."""
    g = torch.Generator().manual_seed(0)
    for _ in range(200):
        q = int(torch.randint(1, 9, (1,), generator=g))
        members = torch.randint(0, 30, (3, q), generator=g) * torch.randint(0, 2, (3, q), generator=g)
        members[:, 0] += 4 * q
        standing = (members * torch.rand(3, q, generator=g)).ceil().long()
        budget = int(torch.randint(q, 4 * q + 1, (1,), generator=g))
        got = shared_out(members, standing, budget, budget)
        assert got.tolist() == [
            slow_shares(m, s, budget, budget)
            for m, s in zip(members.tolist(), standing.tolist(), strict=True)
        ]
        assert got.sum(1).tolist() == [budget] * 3


def test_one_direction():
    """All patches are one: one group, and all but the first go behind; so it is attention alone."""
    ctx = sight(["square"])
    same = replace(ctx, features=torch.zeros_like(ctx.features).index_fill_(2, torch.tensor([2]), 3.0))
    scores = patch_scores(ctx, -2, 0)
    best = sorted(sorted(range(36), key=lambda j: -scores[j])[:6])
    assert PruneSID(6).select(same).tolist() == [best]


def test_no_images():
    assert PruneSID().select(sight(["none"])).shape == (1, 0)


def test_needs():
    assert PruneSID().layers == (0,) and PruneSID().needs(0) == Needs(vision=(-2,))
    with pytest.raises(ValueError, match=r"^ctx\.features: expected what the projector got \(decl.*None$"):
        PruneSID().select(replace(sight(["square"]), features=None))


@pytest.mark.parametrize("seed", [-1, 0.5, True])
def test_rejects(seed):
    with pytest.raises(ValueError, match=r"^seed: expected a whole number in \[0, 2\*\*63\), got "):
        PruneSID(seed=seed)
