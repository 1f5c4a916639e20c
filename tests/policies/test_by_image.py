"""What the methods before the language model share: images cut out of a ragged batch, scores, quotas, errors."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.contexts import case, images_in, patch_scores, sight
from vlmprune.ops.greedy_select import greedy_select
from vlmprune.policies.base import Reduction, outcome
from vlmprune.policies.by_image import nearest, vision_of
from vlmprune.policies.choose import choose_greedily, others
from vlmprune.policies.counts import even_shares
from vlmprune.policies.crops import crops_of, images_of
from vlmprune.policies.groups import Quota
from vlmprune.policies.methods.accm_selection import ACCMSelection
from vlmprune.policies.methods.cdpruner import CDPruner
from vlmprune.policies.methods.divprune import DivPrune
from vlmprune.policies.methods.fastervlm import FasterVLM
from vlmprune.policies.methods.visionzip import VisionZip
from vlmprune.policies.methods.vispruner import VisPruner
from vlmprune.policies.methods.vscan import VScan

BATCHES = [
    pytest.param(["square"], id="one"),
    pytest.param(["square", "square"], id="full"),
    pytest.param(["two", "none", "tall"], id="ragged"),
    pytest.param([((4, 6), (3, 4)), ((2, 6),)], id="as-many-places-as-largest-images"),
    pytest.param(["none", "none"], id="no-images"),
]


@pytest.mark.parametrize("groups_of", [images_of, crops_of])
@pytest.mark.parametrize("images", BATCHES)
def test_split_and_join(images, groups_of):
    ctx = case(images, layer=0).ctx
    found = groups_of(ctx)
    if not found.crops:
        assert not any(ctx.counts)
        return
    split = found.split(ctx.hidden)
    kept = [(n + 1) // 2 for n in found.tokens]
    quota = Quota(tuple(kept), (0,) * len(kept))
    picked = torch.arange(max(kept)).expand(len(kept), -1)
    index, rows = found.index(picked, quota), found.join(split, quota)
    assert torch.equal(found.spread(split), ctx.hidden.masked_fill(~ctx.mask[..., None], 0.0))
    assert index.shape[1] == max((index >= 0).sum(1).tolist(), default=0)
    for sample, here in enumerate(images_in(ctx)):
        expected = []
        for number, first, (r, c) in here:
            assert torch.equal(split[number, : r * c], ctx.hidden[sample, first : first + r * c])
            expected += range(first, first + kept[number])
        assert index[sample].tolist() == expected + [-1] * (index.shape[1] - len(expected))
        assert torch.equal(rows[sample, : len(expected)], ctx.hidden[sample, expected])
        assert not rows[sample, len(expected) :].any()


@pytest.mark.parametrize("images", BATCHES[:-1])
def test_by_kind_puts_groups_back_in_their_order(images):
    found = crops_of(case(images, layer=0).ctx)
    split = found.split(case(images, layer=0).ctx.hidden)
    quota = found.shared_out([n // 2 for n in found.tokens])
    both = found.by_kind(quota, lambda kind: (found.take(split, kind), torch.tensor(kind.members)[:, None]))
    assert torch.equal(both[0], split) and both[1][:, 0].tolist() == [*range(len(split))]


@pytest.mark.parametrize("cls", [True, False])
@pytest.mark.parametrize("few_values", [True, False])
def test_attention_received(cls, few_values):
    ctx = sight(["tall", ((3, 7), (7, 3))], cls=cls, few_values=few_values)
    got = ctx.vision[-2].received()
    assert got.shape == (3, 21) and got.dtype == torch.float32
    for image in range(3):
        assert got[image].tolist() == pytest.approx(patch_scores(ctx, -2, image), abs=1e-6)


def test_others():
    index = torch.tensor([[0, 4], [2, 3]])
    assert others(index, 5).tolist() == [[1, 2, 3], [0, 1, 4]]
    assert others(index[:, :0], 2).tolist() == [[0, 1], [0, 1]]
    assert others(torch.arange(3)[None], 3).shape == (1, 0)


def test_nearest_takes_the_first_of_equals_and_ignores_length():
    targets = torch.tensor([[[1.0, 0], [5, 0], [0, -2], [0, 3]]])
    rows = torch.tensor([[[9.0, 0], [0, 0.1], [0, -1], [-1, 0]]])
    assert nearest(rows, targets).tolist() == [[0, 3, 2, 2]]


@pytest.mark.parametrize("kept", [(4, 4, 4), (7, 0, 3), (1, 9, 2)])
def test_choose_greedily_is_each_row_alone(kept):
    g = torch.Generator().manual_seed(0)
    features, mask = torch.randn(3, 9, 4, generator=g), torch.ones(3, 9, dtype=torch.bool)
    mask[2, 5:] = False
    got = choose_greedily("maxmin", kept, mask, features)
    assert got.shape == (3, max(kept))
    for b, k in enumerate(kept):
        alone, _ = greedy_select(features[b : b + 1], k, "maxmin", mask=mask[b : b + 1])
        assert got[b].tolist() == alone[0].tolist() + [-1] * (max(kept) - k)


def test_outcome():
    index, rows = torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 2, 3)
    assert outcome(index, "keep") is index
    assert outcome(index, "pack") == Reduction(index, None, "pack")
    assert outcome(index, "keep", rows) == Reduction(index, rows, "keep")


class NoWaiting(TorchDispatchMode):
    """Fails at whatever reads a value or a count from the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not any(word in str(func) for word in ("_local_scalar", "nonzero", "masked_select", "unique"))
        masks = args[1] if func.overloadpacket is torch.ops.aten.index else ()
        assert all(mask is None or mask.dtype != torch.bool for mask in masks)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "policy",
    [
        FasterVLM(5),
        VisionZip(4, 3),
        VisPruner(9),
        DivPrune(),
        CDPruner(5),
        ACCMSelection(5),
        ACCMSelection(5, heads="joined", overflow="last", order="selected"),
        VScan(9, window=2),
    ],
    ids=repr,
)
@pytest.mark.parametrize("images", [["square", "square"], ["tall", "none", ((3, 7), (7, 3))]])
def test_nothing_waits_for_the_device(policy, images):
    ctx = sight(images, layers=(-2, 5))
    with NoWaiting():
        policy.select(ctx)


def test_the_check_for_waiting_can_fail():
    ctx = sight(["square"])
    with NoWaiting(), pytest.raises(AssertionError):
        ctx.hidden[ctx.mask]
    with NoWaiting(), pytest.raises(AssertionError):
        float(ctx.hidden.sum())


@pytest.mark.parametrize("policy", [FasterVLM(), VisionZip(), VisPruner(), ACCMSelection(), VScan()])
def test_errors(policy):
    layers = tuple(policy.needs(0).vision)
    ctx = sight(["square"], layers)
    with pytest.raises(ValueError, match=r"^ctx\.vision\[\S+\]: expected query and key \(declare Needs"):
        policy.select(replace(ctx, vision={}))
    with pytest.raises(
        ValueError, match=r"^ctx\.vision\[\S+\]: expected 1 crops of up to 36 tokens, got 1 of 21$"
    ):
        policy.select(replace(ctx, vision=sight(["tall"], layers).vision))
    with pytest.raises(ValueError, match=r"^ctx\.counts: expected \(36,\), every token .*, got \(2,\)$"):
        policy.select(case(["square"], layer=0, kept=[[0, 3]]).ctx)
    with pytest.raises(ValueError, match=r"^positions: expected 'keep' or 'pack', got 'raster'$"):
        replace(policy, positions="raster")
    with pytest.raises(ValueError, match=r"^vision_layer: expected a whole number, got 'last'$"):
        replace(policy, vision_layer="last")


def test_a_tower_of_other_crops():
    ctx = sight(["square", "square"])
    with pytest.raises(
        ValueError, match=r"^ctx\.vision\[-2\]: expected 2 crops of up to 20 tokens, got 2 of 36$"
    ):
        vision_of(ctx, -2, images_of(replace(ctx, grids=(((4, 5), (5, 3)),), counts=(35,))))


@pytest.mark.parametrize("sizes", [[4], [2, 9, 9], [5, 5, 5], [1, 0, 7, 3]])
def test_even_shares(sizes):
    """The fairest there is: nobody who could take more has two fewer than another; the next one goes to somebody."""
    before = [0] * len(sizes)
    for total in range(sum(sizes) + 1):
        shares = even_shares(total, sizes)
        assert sum(shares) == total and all(n <= most for n, most in zip(shares, sizes, strict=True))
        assert all(n == most or n >= max(shares) - 1 for n, most in zip(shares, sizes, strict=True))
        assert all(a <= b for a, b in zip(before, shares, strict=True))
        before = shares
