"""MustDrop against its rule in loops: a key set of every crop, and two thresholds on what the text pays."""

import math
from dataclasses import replace

import pytest
import torch

from helpers.contexts import attention_row, images_in, kept_lists, named, patch_scores, top
from vlmprune.policies import MustDrop, Needs
from vlmprune.policies.base import Reduction
from vlmprune.testing.context import make_case, with_text, with_vision

FIVE = ((4, 5),)
CASES = [
    pytest.param({"images": ["square"]}, id="one-image"),
    pytest.param({"images": [((4, 5), (4, 5)), (), FIVE]}, id="ragged"),
    pytest.param({"images": [FIVE, FIVE], "past": True}, id="cached-past"),
    pytest.param({"images": [FIVE, ((4, 5), (4, 5))], "cls": False}, id="no-cls"),
    pytest.param({"images": [FIVE, FIVE], "few_values": True}, id="ties"),
    pytest.param({"images": [((4, 5), (4, 5))], "kept": [[0, 3, 7, 19, 20, 21, 30, 34]]}, id="after-a-stage"),
    pytest.param({"images": [((1, 1),)]}, id="one-token"),
]


def sighted(images, cls=True, few_values=False, **settings):
    made = with_text(make_case(named(images), 3, few_values=few_values, **settings), few_values)
    return with_vision(made, (-1,), cls=cls, few_values=few_values)


def slow_keys(ctx, share):
    """Per sample the ordinals of its key tokens."""
    found = []
    for images in images_in(ctx):
        mine = set()
        for number, first, (rows, columns) in images:
            scores = [round(s, 7) for s in patch_scores(ctx, -1, number)]
            mine |= {first + j for j in top(scores, math.ceil(share * rows * columns))}
        found.append(mine)
    return found


def slow_map(made, sample):
    """``[t][j]`` head-mean attention of every text row."""
    rows = [r for r in made.ctx.attention.rows[sample].tolist() if r >= 0]
    heads = range(made.ctx.attention.query.shape[1])
    each = [[attention_row(made, sample, r, h) for h in heads] for r in rows]
    return [[sum(x) / len(heads) for x in zip(*some, strict=True)] for some in each]


@pytest.mark.parametrize("settings", CASES)
@pytest.mark.parametrize("thresholds", [(0.001, 0.001), (0.04, 0.05), (0.06, 0.2)])
@pytest.mark.parametrize("share", [0.08, 0.3])
def test_thresholds(settings, thresholds, share):
    made = sighted(**settings)
    policy = MustDrop((3,), *thresholds, key_share=share, positions="pack")
    choice = policy.select(made.ctx)
    assert isinstance(choice, Reduction) and choice.positions == "pack"
    keys = slow_keys(made.ctx, share)
    for sample, got in enumerate(kept_lists(choice.index)):
        paid = slow_map(made, sample)
        sums = [sum(column) for column in zip(*paid, strict=True)]
        total = sum(sums)
        ordinals = made.ctx.ordinals[sample].tolist()
        expected = [
            j
            for j, s in enumerate(sums)
            if not (s < thresholds[0] * total and max(row[j] for row in paid) < thresholds[1])
            or ordinals[j] in keys[sample]
        ]
        assert got == expected


@pytest.mark.parametrize("settings", CASES)
@pytest.mark.parametrize("keep", [1, 0.3, 5, 1.0])
@pytest.mark.parametrize("share", [0, 0.3])
def test_a_known_number(settings, keep, share):
    made = sighted(**settings)
    policy = MustDrop((3,), 0.04, 0.05, keep=keep, key_share=share)
    keys = slow_keys(made.ctx, share)
    for sample, got in enumerate(kept_lists(policy.select(made.ctx))):
        count = policy.kept(made.ctx.counts[sample], len(made.ctx.grids[sample]), 3)
        paid = slow_map(made, sample)
        sums = [sum(column) for column in zip(*paid, strict=True)]
        scores = [
            round(max(s / sum(sums) / 0.04, max(row[j] for row in paid) / 0.05), 6)
            for j, s in enumerate(sums)
        ]
        first = [made.ctx.ordinals[sample, j].item() in keys[sample] for j in range(len(scores))]
        order = sorted(range(len(scores)), key=lambda j: (not first[j], -scores[j], j))
        best = sorted(order[:count])
        if settings.get("few_values"):  # an ulp may tell equal tokens apart: nothing better goes
            assert sorted(scores[j] for j in got) == sorted(scores[j] for j in best)
        else:
            assert got == best


def test_a_known_number_is_the_choice_of_the_thresholds_that_keep_as_many():
    made = sighted(["square"])
    by_data = MustDrop((3,), 0.03, 0.04).select(made.ctx)
    assert 3 < by_data.shape[1] < 36
    assert torch.equal(MustDrop((3,), 0.03, 0.04, keep=by_data.shape[1]).select(made.ctx), by_data)


def test_one_budget_a_stage():
    policy = MustDrop((3, 5), keep=(8, 0.5))
    assert (policy.kept(36, 1, 3), policy.kept(8, 1, 5)) == (8, 4)
    assert policy.at(0.25) == MustDrop((3, 5), keep=0.25)
    assert policy.fixed_count and not MustDrop().fixed_count
    with pytest.raises(ValueError, match=r"^keep: expected a number or share .* advance, got None$"):
        MustDrop().kept(36, 1, 3)


def test_without_text_behind_the_image():
    """By thresholds nothing goes; else key tokens stay, and others spread evenly."""
    made = sighted(["square", "square"], after=[0, 5])
    keys = slow_keys(made.ctx, 0.08)[0]
    assert kept_lists(MustDrop((3,), 0.04, 0.05).select(made.ctx))[0] == list(range(36))
    got = set(kept_lists(MustDrop((3,), keep=9).select(made.ctx))[0])
    assert keys <= got and len(got) == 9
    rest = sorted(got - keys)
    assert rest[0] < 12 and rest[-1] > 23


def test_a_broken_sample_changes_no_other():
    made = sighted([FIVE, FIVE])
    seen = made.ctx.attention
    query = seen.query.clone()
    query[0] = torch.nan
    broken = replace(made.ctx, attention=replace(seen, query=query))
    for policy in (MustDrop((3,), 0.04, 0.05), MustDrop((3,), keep=6)):
        whole, got = (kept_lists(policy.select(ctx)) for ctx in (made.ctx, broken))
        assert got[1] == whole[1]


def test_where_thresholds_and_an_earlier_stage_leave_nothing_one_stays():
    made = sighted([FIVE], kept=[[2, 5, 9]])
    assert MustDrop((3,), 0.9, 0.9, key_share=0).select(made.ctx).tolist() == [[0]]


def test_needs_text_rows_and_a_vision_layer():
    assert MustDrop().needs(3) == Needs(attention="previous", rows="text", vision=(-1,))


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"layers": (0, 2)},
            r"^layer: expected a whole number >= 1 \(the score comes from the layer before\), got 0$",
        ),
        ({"global_thr": 0}, r"^global_thr: expected a number > 0, got 0$"),
        ({"individual_thr": "a"}, r"^individual_thr: expected a number > 0, got 'a'$"),
        ({"keep": 0.0}, r"^keep: expected a share in \(0, 1\] or a whole number .* >= 1, got 0\.0$"),
        ({"keep": (5, 4)}, r"^keep: expected 4 entries, one per layer, got \(5, 4\)$"),
        ({"key_share": 2}, r"^key_share: expected a share in \[0, 1\], got 2$"),
        ({"vision_layer": 1.0}, r"^vision_layer: expected a whole number, got 1\.0$"),
        ({"positions": "drop"}, r"^positions: expected 'keep' or 'pack', got 'drop'$"),
    ],
)
def test_rejects(settings, message):
    with pytest.raises(ValueError, match=message):
        MustDrop(**settings)


def test_says_what_the_wiring_forgot():
    bare = replace(sighted([FIVE]).ctx, attention=None)
    with pytest.raises(ValueError, match=r"^ctx\.attention: expected query and key"):
        MustDrop().select(bare)
