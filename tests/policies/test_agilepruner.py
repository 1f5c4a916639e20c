"""AgilePruner against its formula, patch by patch."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers.contexts import images_in, kept_lists, patch_scores, sight
from vlmprune.policies import FasterVLM
from vlmprune.policies.base import Needs
from vlmprune.policies.methods.agilepruner import AgilePruner

BATCHES = [
    pytest.param({"images": ["square"]}, id="one"),
    pytest.param({"images": ["tall", "none", ((3, 7), (7, 3))]}, id="ragged"),
    pytest.param({"images": ["square"], "few_values": True}, id="ties"),
    pytest.param({"images": [((5, 5),)], "cls": False}, id="no-cls"),
]


def count_of(keep, tokens):
    return min(tokens, keep) if isinstance(keep, int) else max(1, int(keep * tokens))


def slow(features, scores, keep, average, cap):
    v = features.double().cpu().numpy()
    sigma = np.linalg.svd(v, compute_uv=False)
    q = [s / sigma.sum() for s in sigma if s > 1e-12]
    rank = np.exp(-sum(x * np.log(x) for x in q))
    stay, gone = [], []
    order = sorted(range(len(v)), key=lambda j: (-scores[j], j))
    removed = set()
    for place, j in enumerate(order, 1):
        if j in removed:
            gone.append(j)
            continue
        stay.append(j)
        threshold = min(cap, 0.01 * place * rank / average)
        for i in order[place:]:
            distance = 1 - v[i] @ v[j] / (np.linalg.norm(v[i]) * np.linalg.norm(v[j]))
            if distance < threshold:
                removed.add(i)
    return sorted((stay + gone)[:keep]), len(stay)


@pytest.mark.parametrize("settings", BATCHES)
@pytest.mark.parametrize(
    "keep, average, cap", [(6, 0.3, 1.0), (0.4, 1.0, 0.6), (1, 85.0, 0.4), (12, 0.05, 2)]
)
def test_equals_the_formula(settings, keep, average, cap):
    ctx = sight(**settings)
    got = AgilePruner(keep, average, cap, positions="pack").select(ctx)
    thinned = False
    for sample, here in enumerate(images_in(ctx)):
        expected = []
        for number, first, (r, c) in here:
            scores, count = patch_scores(ctx, -2, number), count_of(keep, r * c)
            kept, left = slow(ctx.features[number], scores, count, average, cap)
            expected += [first + j for j in kept]
            thinned |= left < r * c
        assert kept_lists(got.index)[sample] == expected
    assert thinned or average == 85.0


def test_a_rich_image_is_thinned_more_than_a_simple_one():
    """Features in one direction, more or less, and in many: the first keeps what is attended most."""
    ctx = sight(["square"])
    simple = ctx.features[:, :1] + 0.6 * ctx.features.roll(1, 1)
    kept = {}
    for name, features in (("simple", simple), ("rich", ctx.features)):
        scores = patch_scores(ctx, -2, 0)
        kept[name] = AgilePruner(8, average=5.0, cap=0.5).select(replace(ctx, features=features))[0].tolist()
        assert kept[name] == slow(features[0], scores, 8, 5.0, 0.5)[0]


def test_without_a_threshold_it_is_attention_alone():
    ctx = sight(["tall", "none", ((3, 7), (7, 3))])
    assert torch.equal(AgilePruner(5, cap=0).select(ctx), FasterVLM(5).select(ctx))


def test_duplicates_fill_up_by_attention():
    """All patches are one: the first removes all others, which come back in their order."""
    ctx = sight(["square"])
    same = replace(ctx, features=torch.zeros_like(ctx.features).index_fill_(2, torch.tensor([2]), 3.0))
    assert torch.equal(AgilePruner(7, average=1e-3).select(same), FasterVLM(7).select(ctx))


def test_no_images():
    assert AgilePruner().select(sight(["none"])).shape == (1, 0)


def test_needs():
    assert AgilePruner().layers == (0,) and AgilePruner().needs(0) == Needs(vision=(-2,))
    with pytest.raises(ValueError, match=r"^ctx\.features: expected what the projector got \(decl.*None$"):
        AgilePruner().select(replace(sight(["square"]), features=None))


@pytest.mark.parametrize(
    "settings, error",
    [
        ({"average": 0}, "average: expected a number > 0, got 0"),
        ({"average": "many"}, "average: expected a number > 0, got 'many'"),
        ({"cap": -0.1}, "cap: expected a number in [0, 2], got -0.1"),
        ({"cap": 2.5}, "cap: expected a number in [0, 2], got 2.5"),
    ],
)
def test_rejects(settings, error):
    with pytest.raises(ValueError) as caught:
        AgilePruner(**settings)
    assert str(caught.value) == error
