"""FEATHER against its formula, from queries and keys before rotary embedding: RoPE removal is really checked."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers.contexts import case, kept_lists, rope, top
from vlmprune.policies import Feather, Needs

CASES = [
    pytest.param({"images": ["square"]}, id="one-image"),
    pytest.param({"images": ["square"], "last_only": True}, id="last-query-only"),
    pytest.param({"images": ["tall"], "stretch": 1.3}, id="stretched-rope"),
    pytest.param({"images": ["two", "none", "tall"]}, id="ragged"),
    pytest.param({"images": ["two", "tall"], "past": True}, id="cached-past"),
    pytest.param({"images": ["square", "two"], "few_values": True}, id="ties"),
    pytest.param({"images": ["two"], "kept": [[0, 3, 7, 20, 21, 22, 30, 34]]}, id="after-a-stage"),
]
LAYERS = (2, 5)


def slow_scores(case, sample):
    """phi_j = mean over heads of the softmax over image columns of the unrotated q_last . k_j / sqrt(d)."""
    q, k = case.query[sample, :, -1].double().cpu().numpy(), case.key[sample].double().cpu().numpy()
    columns = [c for c in case.ctx.attention.columns[sample].tolist() if c >= 0]
    total = np.zeros(len(columns))
    for h in range(q.shape[0]):
        e = np.exp(k[h // (q.shape[0] // k.shape[0])][columns] @ q[h] / np.sqrt(q.shape[1]))
        total += e / e.sum() / q.shape[0]
    return total.round(12)


def slow_grid(case, sample, stride):
    """Entering tokens on the [::stride, ::stride] grid of their image, by walking the patches."""
    numbers, first = set(), 0
    for rows, cols in case.ctx.grids[sample]:
        numbers |= {first + r * cols + c for r in range(0, rows, stride) for c in range(0, cols, stride)}
        first += rows * cols
    here = case.ctx.ordinals[sample].tolist()
    return {j for j, number in enumerate(here) if number in numbers}


@pytest.mark.parametrize("settings", CASES)
@pytest.mark.parametrize("keep, stride", [(0.3, 3), (0.55, 2), (0.05, 4), (1.0, 3)])
@pytest.mark.parametrize("stage", [0, 1])
def test_equals_the_formula(settings, keep, stride, stage):
    made = case(**settings, layer=LAYERS[stage])
    got = kept_lists(Feather(layers=LAYERS, keep=keep, stride=stride).select(made.ctx))
    for sample, n in enumerate(made.ctx.counts):
        share = keep if stage == 0 else keep**2
        best = top(slow_scores(made, sample), min(n, max(1, int(n * share + 1e-6))))
        expected = set(best) | slow_grid(made, sample, stride) if stage == 0 else set(best)
        assert got[sample] == sorted(expected)


def test_rope_would_change_the_choice():
    """The same context scored with a rotation of nothing: the choice differs, so the tests above can fail."""
    made = case(["square"], layer=5)
    plain = tuple(torch.full_like(t, float(i == 0)) for i, t in enumerate(made.ctx.attention.rope))
    rotated = replace(made.ctx, attention=replace(made.ctx.attention, rope=plain))
    policy = Feather(layers=LAYERS, keep=0.6)
    assert not torch.equal(policy.select(made.ctx), policy.select(rotated))


def test_the_position_of_the_prompt_does_not_matter():
    """Without RoPE the same content far along the sequence scores the same."""
    made = case(["square"], layer=2)
    old = made.ctx.attention
    angle = torch.full_like(old.rope[0], 0.7)
    tables = (angle.cos(), angle.sin())
    far = replace(old, query=rope(made.query, *tables), key=rope(made.key, *tables), rope=tables)
    policy = Feather(layers=LAYERS)
    assert torch.equal(policy.select(made.ctx), policy.select(replace(made.ctx, attention=far)))


def test_paper_counts():
    """n = 729: grid 81, top-k 218, union in 218..299, then int(0.09 n1)."""
    policy = Feather(layers=(8, 16), keep=0.3, stride=3)
    one = ((27, 27),)
    first = case([one], layer=8, last_only=True)
    assert len(slow_grid(first, 0, 3)) == 81
    kept = policy.select(first.ctx)[0].tolist()
    assert 218 <= len(kept) <= 299 and min(kept) >= 0
    assert slow_grid(first, 0, 3) <= set(kept)
    assert len(kept) - len(set(kept) & slow_grid(first, 0, 3)) >= 218 - 81
    second = case([one], layer=16, kept=[kept], last_only=True)
    assert policy.select(second.ctx).shape == (1, int(0.09 * len(kept)))


def test_released_rounding_is_that_of_the_float():
    """Every share of the paper's r in hundredths, typed as 1 - r or as a decimal, and every n up to 1000, at both stages."""
    fewer = 0
    for hundredths in range(1, 100):
        r = hundredths / 100
        for keep in (1 - r, (100 - hundredths) / 100):
            released, exact = (Feather(keep=keep, rounding=how) for how in ("released", "exact"))
            for n in range(1001):
                first, second = int(n * (1 - r)), int(n * ((1 - r) * (1 - r)))
                assert [released._best(n, layer) for layer in (8, 16)] == [
                    min(n, max(1, k)) for k in (first, second)
                ]
                off = exact._best(n, 8) - released._best(n, 8)
                assert off in (0, 1) and exact._best(n, 8) == min(n, max(1, n * (100 - hundredths) // 100))
                fewer += off
    assert fewer == 2 * 641
    assert [Feather(keep=0.7, rounding=how)._best(90, 8) for how in ("released", "exact")] == [62, 63]


@pytest.mark.parametrize("rounding, best", [("exact", 63), ("released", 62)])
def test_rounding_is_what_a_run_keeps(rounding, best):
    """90 tokens at r = 0.3: the best ones together with the first one, which is the grid."""
    policy = Feather(layers=LAYERS, keep=0.7, stride=10, rounding=rounding)
    made = case([((9, 10),)], layer=2)
    assert kept_lists(policy.select(made.ctx)) == [sorted({*top(slow_scores(made, 0), best), 0})]
    later = case([((9, 10),)], layer=5)
    assert policy.select(later.ctx).shape[1] == policy.kept(90, 1, 5) == int(90 * 0.49)


def test_width_is_what_the_fullest_sample_keeps():
    """The wiring takes the width of a batch of one as its count."""
    index = Feather(layers=LAYERS, keep=0.3).select(case(["two", "tall"], layer=2).ctx)
    assert (index >= 0).sum(1).max() == index.shape[1]


def test_needs_the_last_row():
    assert Feather().needs(8) == Needs(attention="previous", rows="last")


def test_lists_become_tuples():
    assert Feather(layers=[2, 5]) == Feather(layers=(2, 5))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"layers": (8,)}, r"^layers: expected two layers, ascending, got \(8,\)$"),
        ({"layers": (1, 2, 3)}, r"^layers: expected two layers, ascending, got \(1, 2, 3\)$"),
        ({"layers": 8}, r"^layers: expected two layers, ascending, got 8$"),
        ({"layers": (8, 8)}, r"^layers: expected two layers, ascending, got \(8, 8\)$"),
        ({"layers": (0, 8)}, r"^layer: expected a whole number >= 1 \(the score .*\), got 0$"),
        ({"keep": 64}, r"^keep: expected a share in \(0, 1\] as a float \(1\.0 is everything\), got 64$"),
        ({"keep": 0.0}, r"^keep: expected a share in \(0, 1\] as a float \(1\.0 is everything\), got 0\.0$"),
        (
            {"keep": float("nan")},
            r"^keep: expected a share in \(0, 1\] as a float \(1\.0 is everything\), got nan$",
        ),
        ({"rounding": "up"}, r"^rounding: expected 'exact' or 'released', got 'up'$"),
        ({"stride": 0}, r"^stride: expected a whole number >= 1, got 0$"),
    ],
)
def test_rejects(settings, message):
    with pytest.raises(ValueError, match=message):
        Feather(**settings)
