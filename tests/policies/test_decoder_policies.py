"""What holds for the decoder methods that read text, merge or pack: the contract, beside each one's formula."""

import pickle
from dataclasses import replace

import pytest
import torch

from vlmprune.policies import FastV, Uniform
from vlmprune.policies.base import Reduction
from vlmprune.policies.compose import Intersection
from vlmprune.policies.dart import DART
from vlmprune.policies.horizon import RandomDeep
from vlmprune.policies.pyramiddrop import PyramidDrop
from vlmprune.policies.sparsevlm import SparseVLM
from vlmprune.policies.sparsevlm_plus import SparseVLMPlus

POLICIES = [
    PyramidDrop(layers=(2,)),
    PyramidDrop(ratio=(0.5, 0.2, 0.1), positions="keep"),
    SparseVLM(),
    SparseVLM(keep=(5, 0.5, 2), merge="sum", positions="keep"),
    SparseVLM(keep=(5, 0.5, 2), recycle=False),
    SparseVLM(version="1.0", tokens=64),
    SparseVLM(version="paper", scale=0.7),
    SparseVLMPlus(),
    SparseVLMPlus(keep=(5, 0.5, 2), heads=3),
    DART(),
    DART(keep=0.3, pivots=(2, 3), count="exact"),
    RandomDeep(keep=0.2),
    FastV(keep=0.6) & Uniform(keep=0.6),
]
BATCHES = [
    pytest.param({"images": ["square"]}, id="one"),
    pytest.param({"images": ["two", "none", "tall"]}, id="ragged"),
    pytest.param({"images": ["none", "square"], "past": True}, id="cached-past"),
    pytest.param({"images": ["two", "square"], "kept": [[1, 6, 33], [0, 1, 2, 9, 35]]}, id="after-a-stage"),
    pytest.param({"images": [((1, 1),), ((5, 1),)]}, id="few-tokens"),
    pytest.param({"images": ["none", "none"]}, id="no-images"),
]


def same(one, other):
    if not isinstance(one, Reduction):
        return torch.equal(one, other)
    merged = one.hidden is other.hidden is None or torch.equal(one.hidden, other.hidden)
    return torch.equal(one.index, other.index) and merged and one.positions == other.positions


@pytest.mark.parametrize("settings", BATCHES)
@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_choice_is_valid_and_repeats(policy, settings, text_case):
    for layer in policy.layers:
        ctx = text_case(**settings, layer=layer).ctx
        choice = policy.select(ctx)
        index = choice.index if isinstance(choice, Reduction) else choice
        assert index.dtype == torch.int64 and index.shape[0] == len(ctx.counts)
        assert index.shape[1] == int((index >= 0).sum(1).max())
        for row, n in zip(index.tolist(), ctx.counts, strict=True):
            used = [i for i in row if i >= 0]
            assert row == used + [-1] * (len(row) - len(used))  # padding on the right only
            assert len(used) == len(set(used)) and all(i < n for i in used) and bool(used) == bool(n)
            if not isinstance(choice, Reduction):
                assert used == sorted(used)
        if isinstance(choice, Reduction) and choice.hidden is not None:
            assert choice.hidden.shape == (*index.shape, ctx.hidden.shape[2])
            assert choice.hidden.dtype == ctx.hidden.dtype and choice.hidden.isfinite().all()
        assert same(choice, pickle.loads(pickle.dumps(policy)).select(ctx))


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_reads_only_what_it_declares(policy, text_case, case):
    for layer in policy.layers:
        needs, settings = policy.needs(layer), {"images": ["two", "tall"], "layer": layer}
        ctx = text_case(**settings).ctx if needs.rows == "text" else case(**settings).ctx
        attention = ctx.attention
        if needs.rows == "last":
            attention = replace(attention, query=attention.query[:, :, -1:], rows=attention.last)
        if needs.rows == "text":  # only the queries from the first text row on
            attention = replace(attention, query=attention.query[:, :, -7:])
        bare = replace(
            ctx,
            hidden=ctx.hidden if needs.hidden else None,
            attention=attention if needs.attention else None,
            embeds=ctx.embeds if needs.embeds else None,
            text=ctx.text if needs.embeds or needs.rows == "text" else None,
        )
        assert same(policy.select(bare), policy.select(ctx))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_half_precision(policy, dtype, text_case):
    """Counts and padding do not depend on the precision; merged rows keep it."""
    for layer in policy.layers:
        ctx = text_case(["two", "none", "tall"], layer=layer).ctx
        seen = ctx.attention
        halves = {name: getattr(seen, name).to(dtype) for name in ("query", "key")}
        rope = tuple(t.to(dtype) for t in seen.rope)
        half = replace(
            ctx,
            hidden=ctx.hidden.to(dtype),
            embeds=ctx.embeds.to(dtype),
            attention=replace(seen, **halves, rope=rope),
        )
        got, full = policy.select(half), policy.select(ctx)
        if isinstance(got, Reduction):
            assert got.hidden is None or got.hidden.dtype == dtype
            got, full = got.index, full.index
        if not isinstance(policy, SparseVLM) or policy.version == "1.5":
            sure = not isinstance(policy, Intersection)  # its size depends on the overlap
            assert not sure or torch.equal(got >= 0, full >= 0)
        assert ((got >= 0).any(1) == ctx.mask.any(1)).all()


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_is_a_value(policy):
    names = {type(p).__name__: type(p) for p in [*POLICIES, FastV(), Uniform()]}
    for copy in (pickle.loads(pickle.dumps(policy)), eval(repr(policy), names)):
        assert copy == policy and hash(copy) == hash(policy)
    assert policy.layers == tuple(sorted(set(policy.layers))) and type(policy).summary
    assert isinstance(policy, Intersection) or type(policy).checked in ("formula", "reading")
