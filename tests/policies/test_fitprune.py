"""FitPrune against its formula in loops: of every pair the highest head, summed over text rows and over visual rows."""

from dataclasses import replace

import pytest
import torch

from helpers.contexts import attention_row, case, kept_lists, top
from vlmprune.policies import FitPrune, Needs
from vlmprune.policies.parts.attention_maps import attention_maps, text_times_image
from vlmprune.policies.parts.fitted import SCHEDULES
from vlmprune.policies.schedule import stage_counts

CASES = [
    pytest.param({"images": ["square"]}, id="one-image"),
    pytest.param({"images": [((4, 5),), (), ((2, 3), (3, 2))]}, id="ragged"),
    pytest.param({"images": [((4, 5),), ((3, 3),)], "past": True}, id="cached-past"),
    pytest.param({"images": [((4, 5),)], "few_values": True}, id="ties"),
    pytest.param({"images": ["two"], "kept": [[0, 3, 7, 20, 21, 30, 34]]}, id="after-a-stage"),
    pytest.param({"images": [((4, 5),), ((4, 5),)], "after": [0, 5]}, id="no-text-behind"),
    pytest.param({"images": [((1, 1),)]}, id="one-token"),
]


def slow_scores(made, sample):
    seen = made.ctx.attention
    columns = [c for c in seen.columns[sample].tolist() if c >= 0]
    rows = [r for r in seen.rows[sample].tolist() if r >= 0]

    def paid(some):
        total = [0.0] * len(columns)
        for row in some:
            heads = [row_of(made, sample, row, h, columns) for h in range(seen.query.shape[1])]
            total = [t + max(each) for t, each in zip(total, zip(*heads, strict=True), strict=True)]
        return total

    text = [r for r in rows if r > max(columns, default=-1)]
    by_text, by_image = paid(text), paid(columns)
    return [round((a if text else 1.0) * b, 7) for a, b in zip(by_text, by_image, strict=True)]


def row_of(made, sample, row, head, columns):
    """Of columns behind the row nothing is seen."""
    seen = made.ctx.attention
    first = seen.key.shape[2] - seen.query.shape[2]
    q = seen.query[sample, head, row - first].double().cpu()
    keys = seen.key[sample, head // (seen.query.shape[1] // seen.key.shape[1])].double().cpu()
    weight = (keys @ q * seen.scale).exp() * made.valid[sample].cpu()
    weight[row + 1 :] = 0
    return [float(weight[c] / weight.sum()) for c in columns]


def test_the_slow_rows_are_the_shared_ones():
    made = case(["square"])
    seen = made.ctx.attention
    columns = seen.columns[0].tolist()
    last = int(seen.last[0])
    assert row_of(made, 0, last, 1, columns) == pytest.approx(attention_row(made, 0, last, 1))


@pytest.mark.parametrize("settings", CASES)
@pytest.mark.parametrize("drop", [0.3, 4, 0])
def test_equals_the_formula(settings, drop):
    made = case(**settings, layer=4)
    policy = FitPrune(layers=(2, 4), drop=drop)
    got = kept_lists(policy.select(made.ctx))
    for sample, n in enumerate(made.ctx.counts):
        gone = drop * n if isinstance(drop, float) else drop * len(made.ctx.grids[sample])
        if "kept" in settings:
            gone = drop * n if isinstance(drop, float) else drop * n / 35 * 2
        count = min(n, max(1, round(n - gone) if isinstance(drop, int) else int(n * (1 - drop) + 1e-6)))
        scores = slow_scores(made, sample)
        if settings.get("few_values"):  # an ulp may tell equal tokens apart: nothing better goes
            close = [round(s, 5) for s in scores]
            assert sorted(close[j] for j in got[sample]) == sorted(close[j] for j in top(scores, count))
        elif "kept" not in settings:
            assert got[sample] == top(scores, count)
        else:
            assert got[sample] == top(scores, len(got[sample]))


def test_the_maximum_over_heads_comes_before_the_sum_over_rows():
    """Of two tokens one has half of one head in every row, the other all of one head or the other in turn."""
    made = case(["square"])
    seen = made.ctx.attention
    maps = torch.cat([paid for _, paid in attention_maps(seen, seen.rows, "max")], 1)
    after = seen.received(seen.rows, head_reduce="max", row_reduce="sum")
    assert (maps.sum(1) >= after - 1e-5).all() and (maps.sum(1) > after + 1e-3).any()


@pytest.mark.parametrize("most", [1, 400, 10**6])
@pytest.mark.parametrize("heads", ["mean", "max"])
def test_maps_do_not_depend_on_how_many_rows_are_made_at_once(most, heads):
    seen = case([((4, 5),), (), ((2, 3),)], past=True).ctx.attention
    parts = list(attention_maps(seen, seen.rows, heads, most))
    assert [slice(0, 1)] == [parts[0][0]] or most > 1
    got = torch.cat([paid for _, paid in parts], 1)
    whole = torch.cat([paid for _, paid in attention_maps(seen, seen.rows, heads)], 1)
    torch.testing.assert_close(got, whole, atol=1e-6, rtol=1e-5)
    if heads == "mean":
        torch.testing.assert_close(got.sum(1), seen.received(row_reduce="sum"), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("reduction", SCHEDULES)
def test_released_schedules_are_exact_on_their_image(reduction):
    """What is gone after every layer of LLaVA-1.5-7B."""
    left, expected = 576, []
    for layer, gone in enumerate(SCHEDULES[reduction], 1):
        left -= gone
        expected += [(layer, left)] if gone else []
    policy = FitPrune(reduction=reduction)
    assert stage_counts(policy, 576) == expected
    assert [policy.kept(2 * entering, 2, layer) for layer, entering in _entering(expected)] == [
        2 * stay for _, stay in expected
    ]


def _entering(stages):
    before = 576
    for layer, left in stages:
        yield layer, before
        before = left


def test_other_images_lose_the_same_shares():
    found = stage_counts(FitPrune(), 2880)
    for (layer, left), (same, of_576) in zip(found, stage_counts(FitPrune(), 576), strict=True):
        assert layer == same and abs(left / 2880 - of_576 / 576) < 0.003


def test_a_budget_of_ones_own():
    assert FitPrune(layers=(2, 4), drop=(3, 0.5)).kept(20, 1, 2) == 17
    assert FitPrune(layers=(2, 4), drop=(3, 0.5)).kept(17, 1, 4) == 8
    assert FitPrune(layers=(2,), drop=30).kept(20, 1, 2) == 1
    assert FitPrune().at(0.75).drop == 0.25 and FitPrune().at(0.75).layers == FitPrune().layers


def test_a_broken_sample_keeps_its_first_tokens():
    made = case([((4, 5),), ((3, 3),)], layer=2)
    seen = made.ctx.attention
    query = seen.query.clone()
    query[0] = torch.nan
    broken = replace(made.ctx, attention=replace(seen, query=query))
    policy = FitPrune(layers=(2,), drop=5)
    whole, got = (kept_lists(policy.select(ctx)) for ctx in (made.ctx, broken))
    assert got == [list(range(15)), whole[1]]
    assert text_times_image(broken.attention)[1, :9].isfinite().all()


def test_needs_every_row():
    assert FitPrune().needs(1) == Needs(attention="previous", rows="all", text=True)
    assert replace(FitPrune(), reduction=10) == FitPrune(reduction=10)


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"reduction": 65},
            r"^reduction: expected one of 10, 20, 30, 40, 50, 55, 60, 70, 80, 90, got 65$",
        ),
        ({"layers": (2, 4)}, r"^layers: expected \(\) for a released schedule, or `drop` too, got \(2, 4\)$"),
        (
            {"layers": (0, 4), "drop": 5},
            r"^layer: expected a whole number >= 1 \(the score comes from the layer before\), got 0$",
        ),
        ({"drop": 1.0}, r"^drop: expected a share in \[0, 1\) or a whole number >= 0, got 1\.0$"),
        ({"drop": True}, r"^drop: expected a share in \[0, 1\) or a whole number >= 0, got True$"),
        ({"layers": (2, 4), "drop": (1,)}, r"^drop: expected 2 entries, one per layer, got \(1,\)$"),
    ],
)
def test_rejects(settings, message):
    with pytest.raises(ValueError, match=message):
        FitPrune(**settings)


def test_says_what_the_wiring_forgot():
    bare = replace(case(["square"]).ctx, attention=None)
    with pytest.raises(ValueError, match=r"^ctx\.attention: expected query and key"):
        FitPrune(layers=(2,), drop=5).select(bare)
