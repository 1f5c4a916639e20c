"""ZOO-Prune against its formula, token by token and direction by direction."""

from dataclasses import replace

import pytest
import torch

from helpers.contexts import images_in, kept_lists, sight
from vlmprune.policies.base import Needs
from vlmprune.policies.methods.zoo_prune import ZOOPrune, taken_apart

BATCHES = [
    pytest.param({"images": ["square"]}, id="one"),
    pytest.param({"images": ["tall", "none", ((3, 7), (7, 3))]}, id="ragged"),
    pytest.param({"images": [((5, 5),)], "cls": False}, id="no-cls"),
]


def count_of(keep, tokens):
    return min(tokens, keep) if isinstance(keep, int) else max(1, int(keep * tokens))


def slow_sensitivity(ctx, image, count, step, seed):
    """Each token moved by itself; the projector of the tests computes in float32."""
    generator = torch.Generator().manual_seed(seed)
    unit = torch.randn(count, ctx.features.shape[2], generator=generator, device="cpu")
    out = []
    for row in ctx.features[image].cpu():
        total = 0.0
        for u in unit.double():
            move = (step * u / u.norm()).float()
            there, back = (ctx.project((row + way * move).to(ctx.device)).double().cpu() for way in (1, -1))
            total += float((there - back).norm()) / (2 * step)
        out.append(total / count)
    return out


def slow(hidden, sensitivity, keep):
    x = hidden.double().cpu()
    low, high = min(sensitivity), max(sensitivity)
    r = [(s - low) / (high - low) if high > low else 1.0 for s in sensitivity]
    kept = []
    for _ in range(keep):
        worth = {}
        for j in range(len(x)):
            if j not in kept:
                cos = [float(x[i] @ x[j] / (x[i].norm() * x[j].norm())) for i in kept]
                worth[j] = r[j] * (1 - max(cos)) if kept else r[j]
        kept.append(max(worth, key=lambda j: (round(worth[j], 10), -j)))
    return sorted(kept)


@pytest.mark.parametrize("settings", BATCHES)
@pytest.mark.parametrize(
    "keep, how", [(6, (8, 0.1, 0)), (0.3, (3, 1.0, 7)), (1, (11, 0.5, 1)), (1.0, (2, 1, 0))]
)
def test_equals_the_formula(settings, keep, how):
    ctx, (count, step, seed) = sight(**settings), how
    got = ZOOPrune(keep, count, step, seed, positions="pack").select(ctx)
    for sample, here in enumerate(images_in(ctx)):
        expected = []
        for number, first, (r, c) in here:
            sensitivity = slow_sensitivity(ctx, number, count, step, seed)
            hidden = ctx.hidden[sample, first : first + r * c]
            expected += [first + j for j in slow(hidden, sensitivity, count_of(keep, r * c))]
        assert kept_lists(got.index)[sample] == expected


def test_the_jacobian():
    """For a small step, the mean length of what the derivative makes of a direction."""
    ctx = sight([((3, 3),)])
    got = ZOOPrune(directions=16, step=0.01, seed=3)._sensitivity(ctx)[0]
    unit = torch.randn(16, ctx.features.shape[2], generator=torch.Generator().manual_seed(3))
    unit = unit / unit.norm(dim=1, keepdim=True)
    for j, row in enumerate(ctx.features[0]):
        jacobian = torch.autograd.functional.jacobian(ctx.project, row.double().float())
        assert float(got[j]) == pytest.approx(float((unit.to(row) @ jacobian.T).norm(dim=1).mean()), rel=1e-3)


def test_another_seed_is_another_choice_and_the_same_seed_the_same():
    ctx = sight(["square"])
    first, again, other = (ZOOPrune(12, 1, seed=seed).select(ctx).tolist() for seed in (0, 0, 1))
    assert first == again != other


def test_equal_sensitivity():
    """Then distance alone counts, from the first token on; of equal ones the first."""
    unit = torch.eye(3)[[0, 0, 1, 1, 2]][None]
    assert taken_apart([3], None, unit, torch.full((1, 5), 0.7)).tolist() == [[0, 2, 4]]
    assert taken_apart([4], None, unit, torch.full((1, 5), 0.7)).tolist() == [[0, 1, 2, 4]]


def test_padding_and_broken_sensitivity():
    unit, mask = torch.eye(4)[None].repeat(2, 1, 1), torch.ones(2, 4, dtype=torch.bool)
    mask[0, 3:] = False
    sensitivity = torch.tensor([[2.0, 3, 1, 9], [float("nan"), 1, float("inf"), 2]])
    assert taken_apart([2, 2], mask, unit, sensitivity).tolist() == [[0, 1], [1, 3]]
    assert taken_apart([3, 1], mask, unit, sensitivity).tolist() == [[0, 1, 2], [3, -1, -1]]


def test_images_may_be_chosen_from_as_one():
    ctx = sight([((4, 5), (5, 4))])
    both = [s for image in (0, 1) for s in slow_sensitivity(ctx, image, 4, 0.5, 0)]
    got = ZOOPrune(4, 4, 0.5, spend="prompt").select(ctx)
    assert got.tolist() == [slow(ctx.hidden[0], both, 8)]


def test_rows_through_the_projector():
    """As many as the docstring says, a few directions at a time."""
    ctx, rows = sight(["square"]), []

    def project(x):
        rows.append(x[..., 0].numel())
        return ctx.project(x)

    ZOOPrune().select(replace(ctx, project=project))
    assert sum(rows) == 2 * 64 * 36 and max(rows) == 8 * 36


def test_no_images():
    assert ZOOPrune().select(sight(["none"])).shape == (1, 0)


def test_needs():
    assert ZOOPrune().layers == (0,) and ZOOPrune().needs(0) == Needs(hidden=True, vision=(-2,))
    for name in ("features", "hidden", "project"):
        with pytest.raises(ValueError, match=rf"^ctx\.{name}: expected .*, got None$"):
            ZOOPrune().select(replace(sight(["square"]), **{name: None}))


@pytest.mark.parametrize(
    "settings, error",
    [
        ({"directions": 0}, "directions: expected a whole number >= 1, got 0"),
        ({"step": 0.0}, "step: expected a number > 0, got 0.0"),
        ({"step": float("inf")}, "step: expected a number > 0, got inf"),
        ({"seed": -1}, "seed: expected a whole number in [0, 2**63), got -1"),
    ],
)
def test_rejects(settings, error):
    with pytest.raises(ValueError) as caught:
        ZOOPrune(**settings)
    assert str(caught.value) == error
