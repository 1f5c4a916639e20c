"""Crops that lie in one another's rows, with newline tokens between: each is chosen from as if it stood alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import vlmprune
from helpers.contexts import sight
from vlmprune.policies.base import Crop, Reduction
from vlmprune.policies.groups import places_of

ROWS, COLUMNS = 4, 5
CROPS = (Crop(0, 5, 4, 5), Crop(20, 11, 4, 5), Crop(25, 11, 4, 5))
"""A small view, and two tiles side by side with a newline behind each line."""
NEWLINES = (30, 41, 52, 63)


def first_column(ctx):
    """So that nothing ties: what does goes by the place in the whole grid."""
    return ctx.hidden[..., 0].abs()


POLICIES = [
    vlmprune.FasterVLM(keep=18),
    vlmprune.FasterVLM(keep=17, positions="pack"),
    vlmprune.VisPruner(keep=18),
    vlmprune.VisionZip(dominant=12, contextual=6),
    vlmprune.VisionZip(dominant=12, contextual=5, positions="pack"),
    vlmprune.VScan(keep=18, window=2),
    vlmprune.Folder(keep=18),
    vlmprune.Folder(keep=17, place="projected"),
    vlmprune.AIM(keep=17, positions="pack"),
    vlmprune.STAR(keep=17),
    vlmprune.ACCMSelection(keep=18, relevance="none"),
    vlmprune.ACCMSelection(keep=18, relevance="none", order="selected", positions="pack"),
    vlmprune.CDPruner(keep=18, relevance=first_column),
    vlmprune.CDPruner(keep=18, relevance=first_column, positions="pack"),
    vlmprune.PruMerge(keep=18, neighbours=3),
    vlmprune.PruMerge(keep=17, plus=True, positions="pack"),
    vlmprune.TRIM(keep=18, relevance=first_column),
    vlmprune.TRIM(keep=17, relevance=first_column, positions="pack"),
    vlmprune.ToMe(keep=17, rounds=4),
    vlmprune.VisionTrim(keep=18, text_ratio=0.0),
    vlmprune.VisionTrim(keep=17, text_ratio=0.0, score="received", positions="pack"),
]

NAMES = [f"{type(policy).__name__}-{i}" for i, policy in enumerate(POLICIES)]


def mosaic(alone):
    """The context of three crops, which were samples of their own, as one sample of one image."""
    places = [places_of(crop) for crop in CROPS]
    count = 20 + 4 * 11
    hidden = torch.full((1, count, alone.hidden.shape[2]), 7.0)
    for crop, at in enumerate(places):
        hidden[0, at] = alone.hidden[crop]
    order = torch.arange(count)[None]
    return replace(
        alone,
        mask=torch.ones(1, count, dtype=torch.bool),
        counts=(count,),
        ordinals=order,
        positions=order + 3,
        grids=(((4, 5), (4, 11)),),
        sizes=((count,),),
        crops=((CROPS,),),
        hidden=hidden,
    )


def answer(policy, ctx):
    made = policy.select(ctx)
    return made if isinstance(made, Reduction) else Reduction(made)


@pytest.mark.parametrize("policy", POLICIES, ids=NAMES)
def test_each_crop_as_if_alone(policy):
    alone = sight([((ROWS, COLUMNS),)] * 3, layers=tuple(policy.needs(0).vision) or (-2,))
    got = answer(policy, mosaic(alone))
    index, rows = got.index[0].tolist(), got.hidden
    assert not {*index} & {*NEWLINES} and len({*index}) == len(index)
    total = policy.kept(64, 1, 0)
    for i, crop in enumerate(CROPS):
        each = total // 3 + (i < total % 3)
        if isinstance(policy, vlmprune.VisionZip):
            first, more = 4, each - 4
            own = replace(policy, dominant=first, contextual=more)
        else:
            own = replace(policy, keep=each)
        want = answer(own, alone)
        here, places = [n for n in index if n in places_of(crop)], places_of(crop)
        assert sorted(here) == sorted(places[n] for n in want.index[i].tolist())
        if rows is not None:
            made = {n: rows[0, index.index(n)] for n in here}
            for n, row in zip(want.index[i].tolist(), want.hidden[i], strict=True):
                torch.testing.assert_close(made[places[n]], row)


@pytest.mark.parametrize("share", [0.01, 0.04])
@pytest.mark.parametrize("policy", POLICIES, ids=NAMES)
def test_with_fewer_tokens_than_crops_the_first_crops_keep_one_each(policy, share):
    policy = policy.at(share)
    ctx = mosaic(sight([((ROWS, COLUMNS),)] * 3, layers=tuple(policy.needs(0).vision) or (-2,)))
    index = answer(policy, ctx).index[0].tolist()
    owner = [next(i for i, crop in enumerate(CROPS) if n in places_of(crop)) for n in index]
    assert sorted(owner) == [*range(max(1, int(64 * share)))]


@pytest.mark.parametrize("policy", POLICIES, ids=NAMES)
def test_kept_positions_ascend_and_packed_ones_stand_crop_by_crop(policy):
    alone = sight([((ROWS, COLUMNS),)] * 3, layers=tuple(policy.needs(0).vision) or (-2,))
    index = answer(policy, mosaic(alone)).index[0].tolist()
    raster = policy.positions == "keep" or policy.ranks(0)
    owner = [next(i for i, crop in enumerate(CROPS) if n in places_of(crop)) for n in index]
    assert index == sorted(index) if raster else owner == sorted(owner)


@pytest.mark.parametrize("keep", [61, 64, 1.0])
def test_newlines_stay_when_all_others_do(keep):
    alone = sight([((ROWS, COLUMNS),)] * 3)
    for policy in (
        vlmprune.FasterVLM(keep=keep),
        vlmprune.VisPruner(keep=keep),
        vlmprune.VScan(keep=keep, window=2),
        vlmprune.Folder(keep=keep),
    ):
        ctx = mosaic(sight([((ROWS, COLUMNS),)] * 3, layers=tuple(policy.needs(0).vision)))
        got = answer(policy, ctx)
        index = got.index[0].tolist()
        some = policy.kept(64, 1, 0) - 60
        assert sorted({*index} & {*NEWLINES}) == [*NEWLINES[:some]] and len(index) == 60 + some
        if got.hidden is not None:
            assert all((got.hidden[0, index.index(n)] == 7).all() for n in NEWLINES[:some])
    assert alone.counts == (20, 20, 20)


def test_a_merged_row_is_the_mean_of_those_it_stands_for():
    policy = vlmprune.VScan(keep=18, window=2)
    ctx = mosaic(sight([((ROWS, COLUMNS),)] * 3, layers=tuple(policy.needs(0).vision)))
    got = answer(policy, ctx)
    merged, index = got.merged[0].tolist(), got.index[0].tolist()
    assert [n for n, into in enumerate(merged) if into < 0] == sorted([*index, *NEWLINES])
    for n, row in zip(index, got.hidden[0], strict=True):
        stands = [n, *(m for m, into in enumerate(merged) if into == n)]
        torch.testing.assert_close(row, ctx.hidden[0, stands].mean(0))


def test_tokens_merge_within_their_crop_and_into_contextual_ones():
    policy = vlmprune.VisionZip(dominant=12, contextual=6)
    ctx = mosaic(sight([((ROWS, COLUMNS),)] * 3))
    got = answer(policy, ctx)
    merged, index = got.merged[0].tolist(), got.index[0].tolist()
    for crop in CROPS:
        own = set(places_of(crop))
        targets = {merged[n] for n in own if merged[n] >= 0}
        assert targets <= own & {*index} and len(targets) <= 2
        assert sum(merged[n] >= 0 for n in own) == 20 - 6 and all(merged[n] < 0 for n in index)


@pytest.mark.parametrize(
    "method", [vlmprune.FasterVLM(keep=18), vlmprune.Random(0, keep=16, spend="crop")], ids=repr
)
def test_without_sinks_every_crop_keeps_its_share_of_others(method):
    """Tiles lie in one another's rows: what takes a sink's place is the next best of its own crop."""
    alone = sight([((ROWS, COLUMNS),)] * 3)
    alone = replace(alone, hidden=torch.ones_like(alone.hidden))
    plain, ctx = answer(method, mosaic(alone)).index[0].tolist(), mosaic(alone)
    ctx.hidden[0, plain[::2], 3] = 100.0  # every second one that would stay is a sink
    policy = vlmprune.WithoutSinks(method, tau=1.5)
    sinks, got = {*plain[::2]}, answer(policy, ctx).index[0].tolist()
    assert policy.spends(0) == "crop" and {*ctx.hidden[0, :, 3].gt(1.5).nonzero()[:, 0].tolist()} == {
        *sinks,
        *NEWLINES,
    }
    for i, crop in enumerate(CROPS):
        here = {*places_of(crop)}
        more = method.kept(64, 1, 0) // 3 + (i < method.kept(64, 1, 0) % 3)
        assert {*got} & here >= {*plain} & here - sinks and len({*got} & here) == more
    assert not {*got} & sinks and not {*got} & {*NEWLINES}
