"""SCOPE against its formula, pair by pair."""

from dataclasses import replace

import pytest
import torch

from helpers.contexts import images_in, kept_lists, patch_scores, sight
from vlmprune.policies.base import Needs
from vlmprune.policies.methods.scope import SCOPE

BATCHES = [
    pytest.param({"images": ["square"]}, id="one"),
    pytest.param({"images": ["tall", "none", ((3, 7), (7, 3))]}, id="ragged"),
    pytest.param({"images": ["square"], "few_values": True}, id="ties"),
    pytest.param({"images": [((5, 5),)], "cls": False}, id="no-cls"),
]


def count_of(keep, tokens):
    return min(tokens, keep) if isinstance(keep, int) else max(1, int(keep * tokens))


def slow(features, scores, keep, alpha):
    x = features.double().cpu()
    length = x.norm(dim=1)
    n = len(x)
    cos = [[float(x[i] @ x[j] / (length[i] * length[j])) for j in range(n)] for i in range(n)]
    covered, kept = [0.0] * n, []
    for _ in range(keep):
        worth = {}
        for j in range(n):
            if j not in kept:
                gain = sum(max(0.0, cos[i][j] - covered[i]) for i in range(n))
                worth[j] = round(gain * scores[j] ** alpha, 10)
        best = max(worth, key=lambda j: (worth[j], -j))
        kept.append(best)
        covered = [max(covered[i], cos[i][best]) for i in range(n)]
    return sorted(kept)


@pytest.mark.parametrize("settings", BATCHES)
@pytest.mark.parametrize("keep, alpha", [(6, 1.0), (0.3, 0.5), (1, 2), (5, 0), (1.0, 1.0)])
def test_equals_the_formula(settings, keep, alpha):
    ctx = sight(**settings)
    got = SCOPE(keep, alpha, positions="pack").select(ctx)
    for sample, here in enumerate(images_in(ctx)):
        expected = []
        for number, first, (r, c) in here:
            scores = patch_scores(ctx, -2, number)
            expected += [first + j for j in slow(ctx.features[number], scores, count_of(keep, r * c), alpha)]
        assert kept_lists(got.index)[sample] == expected


def test_duplicates():
    """Of two equal tokens the second covers nothing: it comes last, whatever is paid to it."""
    ctx = sight([((2, 3),)])
    axes = torch.zeros_like(ctx.features)
    for j, axis in enumerate((0, 0, 1, 1, 2, 2)):
        axes[0, j, axis] = 1.0 + j
    index = SCOPE(3).select(replace(ctx, features=axes))[0].tolist()
    assert [j // 2 for j in index] == [0, 1, 2]
    assert index == slow(axes[0], patch_scores(ctx, -2, 0), 3, 1.0)


def test_images_and_prompts_may_be_chosen_from_as_one():
    ctx = sight([((4, 5), (5, 4))])
    by_crop, by_image, by_prompt = (
        SCOPE(4, spend=spend).select(ctx)[0].tolist() for spend in ("crop", "image", "prompt")
    )
    assert by_crop == by_image and len(by_prompt) == 8
    both = torch.cat([*ctx.features])
    scores = patch_scores(ctx, -2, 0) + patch_scores(ctx, -2, 1)
    assert by_prompt == slow(both, scores, 8, 1.0)


def test_no_images():
    assert SCOPE().select(sight(["none"])).shape == (1, 0)


def test_needs():
    assert SCOPE().layers == (0,) and SCOPE(vision_layer=-1).needs(0) == Needs(vision=(-1,))
    with pytest.raises(ValueError, match=r"^ctx\.features: expected what the projector got \(decl.*None$"):
        SCOPE().select(replace(sight(["square"]), features=None))


@pytest.mark.parametrize("alpha", [-0.1, "one", True, float("nan"), float("inf")])
def test_rejects(alpha):
    with pytest.raises(ValueError, match=r"^alpha: expected a number >= 0, got "):
        SCOPE(alpha=alpha)
