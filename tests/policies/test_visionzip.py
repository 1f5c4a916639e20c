"""VisionZip against its formula: dominant patches, strided targets, and every other patch merged into one of them."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers import contexts
from helpers.contexts import images_in, patch_scores
from vlmprune.policies.base import Needs
from vlmprune.policies.methods.visionzip import VisionZip

BATCHES = [
    pytest.param({"images": ["square"]}, id="one"),
    pytest.param({"images": ["tall", "none", ((3, 7), (7, 3))]}, id="ragged"),
    pytest.param({"images": ["square"], "few_values": True}, id="ties"),
    pytest.param({"images": ["square", "square"], "cls": False}, id="no-cls"),
]


def sight(*args, **kwargs):
    """Contexts whose hidden states are the projected features, as before layer 0. The projection is not linear, so
    merging before it and behind it differ."""
    ctx = contexts.sight(*args, **kwargs)
    hidden, image = torch.zeros_like(ctx.hidden), 0
    for sample, grids in enumerate(ctx.grids):
        first = 0
        for rows, columns in grids:
            hidden[sample, first : first + rows * columns] = ctx.project(ctx.features[image])
            first, image = first + rows * columns, image + 1
    return replace(ctx, hidden=hidden)


def cosine(a, b):
    length = np.linalg.norm(a) * np.linalg.norm(b)
    return round(float(a @ b / length), 6) if length else 0.0


def slow(scores, keys, rows, dominant, contextual):
    """(patch, merged row) pairs of one image, dominant first."""
    order = sorted(range(len(scores)), key=lambda j: (-scores[j], j))
    best = sorted(order[:dominant])
    rest = [j for j in range(len(scores)) if j not in best]
    contextual = min(contextual, len(rest))
    targets = rest[:: len(rest) // contextual][:contextual] if contextual else []
    followers = {t: [] for t in targets}
    for j in rest if targets else []:
        if j not in targets:
            alike = [cosine(keys[j], keys[t]) for t in targets]
            followers[targets[alike.index(max(alike))]].append(j)
    merged = [rows[t] + (np.mean([rows[j] for j in f], 0) if f else 0.0) for t, f in followers.items()]
    return [(j, rows[j]) for j in best] + list(zip(targets, merged, strict=True))


def expected_of(ctx, dominant, contextual):
    """Per sample, what the images keep, one after another."""
    for here in images_in(ctx):
        found = []
        for number, first, _ in here:
            seen = ctx.vision[-2]
            keys = seen.key[number, :, int(seen.cls) :].double().mean(0).cpu().numpy()
            rows = ctx.features[number].double().cpu().numpy()
            zipped = slow(patch_scores(ctx, -2, number), keys, rows, dominant, contextual)
            found += [
                (first + j, ctx.project(torch.from_numpy(row)).double().cpu().numpy()) for j, row in zipped
            ]
        yield found


@pytest.mark.parametrize("settings", BATCHES)
@pytest.mark.parametrize("dominant, contextual", [(5, 3), (4, 0), (1, 12), (20, 10), (100, 7), (9, 1)])
@pytest.mark.parametrize("positions", ["pack", "keep"])
def test_equals_the_formula(settings, dominant, contextual, positions):
    ctx = sight(**settings)
    got = VisionZip(dominant, contextual, positions=positions).select(ctx)
    assert got.positions == positions
    found = list(expected_of(ctx, dominant, contextual))
    assert got.index.shape[1] == max(map(len, found))
    for sample, pairs in enumerate(found):
        pairs = sorted(pairs, key=lambda p: p[0]) if positions == "keep" else pairs
        kept = [j for j, _ in pairs]
        assert got.index[sample].tolist() == kept + [-1] * (got.index.shape[1] - len(kept))
        for row, (_, expected) in zip(got.hidden[sample].double().cpu().numpy(), pairs, strict=False):
            assert row == pytest.approx(expected, abs=1e-5)


def test_keys_along_axes():
    """Cosines of exactly 0, 1 and -1, so most patches tie between targets; some keys are zero."""
    ctx = sight(["square"], H=1)
    g = torch.Generator().manual_seed(5)
    axis, sign = torch.randint(8, (37,), generator=g), torch.randint(-1, 2, (37,), generator=g)
    seen = ctx.vision[-2]
    ctx = replace(ctx, vision={-2: replace(seen, key=(torch.eye(8)[axis] * sign[:, None])[None, None])})
    got = VisionZip(6, 7, positions="pack").select(ctx)
    (pairs,) = expected_of(ctx, 6, 7)
    assert got.index.tolist() == [[j for j, _ in pairs]]
    assert got.hidden[0].double().cpu().numpy() == pytest.approx(
        np.stack([row for _, row in pairs]), abs=1e-5
    )


def test_a_target_counts_in_full_beside_the_mean():
    """Constant rows of 1: a contextual token with followers is 2, one without is 1, a dominant one 1."""
    ctx = sight(["square"])
    ones = torch.ones(1, 36, 12)
    ctx = replace(ctx, hidden=ones, features=ones, project=lambda x: x)
    assert VisionZip(6, 30, positions="pack").select(ctx).hidden.unique().tolist() == [1.0]
    rows = VisionZip(6, 1, positions="pack").select(ctx).hidden[0]
    assert rows[:6].unique().tolist() == [1.0] and rows[6:].unique().tolist() == [2.0]


def test_half_precision_rows_keep_their_dtype():
    ctx = sight(["square"])
    rows = VisionZip(5, 3, positions="pack").select(replace(ctx, hidden=ctx.hidden.bfloat16())).hidden
    exact = VisionZip(5, 3, positions="pack").select(ctx).hidden
    assert rows.dtype == torch.bfloat16
    assert torch.allclose(rows.float(), exact, atol=0.05)


@pytest.mark.parametrize(
    "tokens, dominant, contextual", [(192, 162, 30), (128, 108, 20), (64, 54, 10), (32, 27, 5)]
)
def test_presets(tokens, dominant, contextual):
    policy = VisionZip(tokens=tokens, positions="pack")
    assert (policy.dominant, policy.contextual) == (dominant, contextual)
    assert policy == VisionZip(dominant, contextual, tokens=tokens, positions="pack") == replace(policy)
    ctx = sight([((24, 24),)])
    assert policy.select(ctx).index.shape == (1, tokens)
    assert VisionZip(tokens=tokens, count_cls=True, positions="pack").select(ctx).index.shape == (
        1,
        tokens - 1,
    )


def test_defaults():
    assert (
        VisionZip(positions="pack") == VisionZip(54, 10, positions="pack")
        and VisionZip(dominant=7, positions="pack").contextual == 10
    )
    assert VisionZip(positions="pack").layers == (0,)
    assert VisionZip(vision_layer=4, positions="pack").needs(0) == Needs(hidden=True, vision=(4,))


def test_no_images():
    assert VisionZip(positions="pack").select(sight(["none"])).shape == (1, 0)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"tokens": 100}, r"^tokens: expected one of 192, 128, 64, 32, got 100$"),
        ({"tokens": 0}, r"^tokens: expected one of 192, 128, 64, 32, got 0$"),
        ({"tokens": 64.0}, r"^tokens: expected one of 192, 128, 64, 32, got 64\.0$"),
        ({"tokens": 192, "dominant": 54}, r"^dominant: expected 162 with tokens=192, got 54$"),
        ({"dominant": 0}, r"^dominant: expected a whole number >= 1, got 0$"),
        ({"dominant": 1, "count_cls": True}, r"^dominant: expected a whole number >= 2, got 1$"),
        ({"contextual": -1}, r"^contextual: expected a whole number >= 0, got -1$"),
        ({"contextual": 2.0}, r"^contextual: expected a whole number >= 0, got 2\.0$"),
        ({"count_cls": 1}, r"^count_cls: expected True or False, got 1$"),
    ],
)
def test_rejects(settings, message):
    with pytest.raises(ValueError, match=message):
        VisionZip(**settings)


def test_missing_rows():
    with pytest.raises(
        ValueError, match=r"^ctx\.hidden: expected hidden states \(declare Needs\(hidden=True\)\), got None$"
    ):
        VisionZip(positions="pack").select(replace(sight(["square"]), hidden=None))
