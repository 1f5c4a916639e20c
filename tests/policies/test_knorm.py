"""KNorm against its formula in NumPy loops: L2 norm of the keys' mean over heads, the shortest stay."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers.contexts import case, kept_lists, top
from vlmprune.policies import KNorm, Needs

CASES = [
    pytest.param({"images": ["square"]}, id="one-image"),
    pytest.param({"images": ["two", "none", "tall"]}, id="ragged"),
    pytest.param({"images": ["two", "tall"], "past": True}, id="cached-past"),
    pytest.param({"images": ["square", "tall"], "few_values": True}, id="ties"),
    pytest.param({"images": ["two"], "kept": [[0, 3, 7, 20, 21, 30, 34]]}, id="after-a-stage"),
]


def slow_scores(ctx, sample):
    """Minus the L2 norm of each visual column's key, averaged over heads first; the released code keeps the smallest."""
    keys = ctx.attention.key[sample].double().cpu().numpy()  # [Hkv, S, D]
    columns = [c for c in ctx.attention.columns[sample].tolist() if c >= 0]
    return [-round(float(np.sqrt((keys[:, c].mean(0) ** 2).sum())), 6) for c in columns]


@pytest.mark.parametrize("settings", CASES)
@pytest.mark.parametrize("keep", [0.5, 0.13, 4])
def test_equals_the_formula(settings, keep):
    ctx = case(**settings).ctx
    got = kept_lists(KNorm(layer=2, keep=keep).select(ctx))
    for sample, n in enumerate(ctx.counts):
        images = len(ctx.grids[sample])
        count = min(n, max(1, int(keep * n)) if isinstance(keep, float) else keep * images)
        assert got[sample] == top(slow_scores(ctx, sample), count)


def test_heads_are_averaged_before_the_norm():
    """Two heads that point against each other make a short key, however long each is."""
    ctx = case(["tall"]).ctx
    key = torch.ones_like(ctx.attention.key)
    at = ctx.attention.columns[0, 5]
    key[0, :, at] = 9.0
    key[0, ::2, at] = -9.0
    ctx = replace(ctx, attention=replace(ctx.attention, key=key))
    assert kept_lists(KNorm(keep=1).select(ctx)) == [[5]]


def test_reads_keys_alone():
    assert KNorm().needs(2) == Needs(attention="previous", keys_only=True)
    ctx = case(["square"]).ctx
    bare = replace(ctx, attention=replace(ctx.attention, query=ctx.attention.query[:, :, :0]))
    assert torch.equal(KNorm().select(bare), KNorm().select(ctx))


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            dict(layer=0),
            r"^layer: expected a whole number >= 1 \(the keys come from the layer before\), got 0$",
        ),
        (dict(keep=0), "^keep: expected a share"),
        (dict(spend="all"), "^spend: expected 'prompt', 'image' or 'crop', got 'all'$"),
    ],
)
def test_rejects(settings, message):
    with pytest.raises(ValueError, match=message):
        KNorm(**settings)


def test_says_what_the_wiring_forgot():
    with pytest.raises(ValueError, match=r"^ctx\.attention: expected query and key"):
        KNorm().select(replace(case(["square"]).ctx, attention=None))
