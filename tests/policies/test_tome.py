"""ToMe against rounds of matching written out, in the tower's features."""

from dataclasses import replace

import pytest
import torch

from helpers.contexts import images_in
from helpers.folds import assert_folded, fold_slowly, projected_sight
from vlmprune.policies import Folder, ToMe
from vlmprune.policies.base import Needs
from vlmprune.policies.counts import keep_count

BATCHES = [
    pytest.param({"images": ["square"]}, id="one"),
    pytest.param({"images": ["tall", "none", ((3, 7), (7, 3))]}, id="ragged"),
    pytest.param({"images": ["square", "square"], "cls": False}, id="no-cls"),
    pytest.param({"images": ["square"], "side": 2}, id="tokens of four patches"),
]


def assert_merged(ctx, keep, rounds):
    got = ToMe(keep=keep, rounds=rounds).select(ctx)
    for sample, here in enumerate(images_in(ctx)):
        found = []
        for number, first, _ in here:
            seen = ctx.vision[-2]
            keys = seen.key[..., int(seen.cls) :, :].double().mean(1)
            if seen.cells is not None:
                keys = keys.flatten(0, 1)[seen.cells].mean(2)
            features = ctx.features[number].double().cpu().numpy()
            how = {"first": 0 if seen.cls else 1, "weighted": True, "least": rounds}
            count = keep_count(keep, len(features))
            found += [
                (first, token) for token in fold_slowly(keys[number].cpu().numpy(), features, count, **how)
            ]
        assert_folded(
            got, sample, found, lambda t: ctx.project(torch.from_numpy(t.row).float()).double().cpu().numpy()
        )


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("keep, rounds", [(12, 23), (0.7, 4), (1, 2), (5, 1), (1000, 3)])
def test_equals_the_formula(batch, keep, rounds):
    tower = {"cls": False} if "side" in batch else {}
    assert_merged(projected_sight(**batch, **tower), keep, rounds)


@pytest.mark.parametrize("rounds", [1, 5])
@pytest.mark.parametrize("cls", [True, False])
def test_ties_go_to_the_first(rounds, cls):
    """Keys along three axes, some of them zero: cosines of exactly 0 and 1."""
    ctx = projected_sight(["square"], cls=cls)
    seen = ctx.vision[-2]
    axis = torch.randint(4, (1, 1, seen.key.shape[2]), generator=torch.Generator().manual_seed(1))
    axes = torch.eye(4, seen.key.shape[3])
    axes[3] = 0
    key = axes[axis].expand_as(seen.key)
    assert_merged(replace(ctx, vision={-2: replace(seen, key=key)}), 0.6, rounds)


def test_doubles_become_one():
    """In one round: every patch that is there twice, as it was."""
    ctx = projected_sight(["square"])
    twice = torch.randn(1, 18, ctx.features.shape[2], generator=torch.Generator().manual_seed(0))
    seen = ctx.vision[-2]
    key = torch.cat([seen.key[:, :, :1], seen.key[:, :, 1:19].repeat_interleave(2, 2)], 2)
    features = twice.repeat_interleave(2, 1)
    ctx = replace(ctx, vision={-2: replace(seen, key=key)}, features=features, hidden=ctx.project(features))
    got = ToMe(keep=0.5, rounds=1).select(ctx)
    assert got.index[0].tolist() == list(range(0, 36, 2))
    torch.testing.assert_close(got.hidden, ctx.project(twice))


def test_few_rounds_are_those_of_folder_without_attention():
    """And many are not: what merges first is more alike."""
    ctx = projected_sight(["square"])
    folded = Folder(keep=12, alpha=0.0).select(ctx)
    few, many = (ToMe(keep=12, rounds=rounds).select(ctx) for rounds in (1, 23))
    assert torch.equal(few.index, folded.index) and torch.equal(few.hidden, folded.hidden)
    assert not torch.equal(many.index, folded.index)


def test_what_stays_alone_is_not_touched():
    ctx = projected_sight(["square"])
    got = ToMe(keep=30).select(ctx)
    alone = [i for i, at in enumerate(got.index[0].tolist()) if at not in got.merged[0].tolist()]
    assert len(alone) >= 24
    assert torch.equal(got.hidden[0, alone], ctx.hidden[0, got.index[0, alone]])


def test_packed_is_the_same_in_raster_order():
    ctx = projected_sight(["tall", ((3, 7), (7, 3))])
    kept, packed = (ToMe(keep=9, positions=how).select(ctx) for how in ("keep", "pack"))
    assert packed.positions == "pack" and torch.equal(kept.index, packed.index)
    assert torch.equal(kept.hidden, packed.hidden)


def test_needs():
    assert ToMe().needs(0) == Needs(hidden=True, vision=(-2,))
    assert ToMe(vision_layer=3).needs(0) == Needs(hidden=True, vision=(3,))


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"keep": 0}, "keep: expected a share in (0, 1] or a whole number of tokens per image >= 1, got 0"),
        ({"rounds": 0}, "rounds: expected a whole number >= 1, got 0"),
        ({"vision_layer": 0.5}, "vision_layer: expected a whole number, got 0.5"),
        ({"positions": "own"}, "positions: expected 'keep' or 'pack', got 'own'"),
    ],
)
def test_settings(settings, said):
    with pytest.raises(ValueError) as error:
        ToMe(**settings)
    assert str(error.value) == said
