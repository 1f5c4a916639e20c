"""What holds for every policy: a valid index, the same one each time, settings that are values."""

import dataclasses
import pickle

import pytest
import torch

from vlmprune import policies
from vlmprune.policies import Custom, FastV, Feather, Random, Stages, Uniform

BATCHES = [
    pytest.param({"images": ["square"]}, id="one"),
    pytest.param({"images": [((1, 1),)]}, id="one-token"),
    pytest.param({"images": ["two", "none", "tall"]}, id="ragged"),
    pytest.param({"images": ["none", "square"], "past": True}, id="cached-past"),
    pytest.param({"images": ["square", "square"], "few_values": True}, id="ties"),
    pytest.param({"images": ["two", "square"], "kept": [[1, 6, 33], [0, 1, 2, 9, 35]]}, id="after-a-stage"),
    pytest.param({"images": ["none", "none"]}, id="no-images"),
]


def every_other(ctx):
    even = torch.arange(0, ctx.mask.shape[1] + 1, 2).expand(len(ctx.counts), -1)
    return torch.where(even < torch.tensor(ctx.counts)[:, None], even, -1)


POLICIES = [
    FastV(),
    FastV(keep=5, rows="mean"),
    Feather(layers=(1, 4)),
    Feather(layers=(2, 3), keep=0.9, stride=2),
    Random(keep=0.4, seed=7),
    Random(keep=3),
    Uniform(),
    Uniform(keep=5),
    Uniform(stride=2),
    Custom(2, every_other),
    Stages([FastV(layer=1, keep=0.2), Random(layer=4)]),
    FastV(keep=4) | Uniform(stride=3) | Random(keep=0.1),
]
ALL_STAY = [
    FastV(keep=1.0),
    FastV(keep=10_000, rows="mean"),
    Feather(layers=(2, 3), keep=1.0),
    Random(keep=1.0),
    Random(keep=10_000),
    Uniform(keep=1.0),
    Uniform(keep=10_000),
    Uniform(stride=1),
    Stages([Random(layer=2, keep=1.0), Uniform(layer=3, keep=36)]),
    Random(keep=1) | FastV(keep=1.0),
]


def each_stage(policy, case, settings):
    return [case(**settings, layer=layer).ctx for layer in policy.layers]


@pytest.mark.parametrize("settings", BATCHES)
@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_index_is_valid(policy, settings, case):
    for ctx in each_stage(policy, case, settings):
        index = policy.select(ctx)
        assert index.dtype == torch.int64 and index.device == ctx.mask.device
        assert index.shape[0] == len(ctx.counts)
        kept = (index >= 0).sum(1)
        assert int(kept.max()) == index.shape[1]  # no column is padding everywhere
        for row, count, tokens in zip(index.tolist(), kept.tolist(), ctx.counts, strict=True):
            assert row == sorted(set(row[:count])) + [-1] * (len(row) - count)
            assert all(0 <= i < tokens for i in row[:count])
            assert (count > 0) == (tokens > 0)


@pytest.mark.parametrize("settings", BATCHES)
@pytest.mark.parametrize("policy", ALL_STAY, ids=repr)
def test_all_stay(policy, settings, case):
    for ctx in each_stage(policy, case, settings):
        everything = torch.where(ctx.mask, torch.arange(ctx.mask.shape[1]), -1)
        assert torch.equal(policy.select(ctx), everything)


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_deterministic_and_leaves_its_input_alone(policy, case):
    for ctx in each_stage(policy, case, {"images": ["two", "none", "tall"]}):
        tensors = [ctx.mask, ctx.ordinals, ctx.positions, ctx.hidden, *vars_of(ctx.attention)]
        before = [t.clone() for t in tensors]
        first = policy.select(ctx)
        assert torch.equal(first, policy.select(ctx))
        assert torch.equal(first, pickle.loads(pickle.dumps(policy)).select(ctx))
        assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))


def vars_of(attention):
    return [t for t in dataclasses.asdict(attention).values() if isinstance(t, torch.Tensor)]


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_reads_only_what_it_declares(policy, case):
    for ctx in each_stage(policy, case, {"images": ["two", "tall"]}):
        needs = policy.needs(ctx.layer)
        attention = ctx.attention
        if needs.rows == "last":
            attention = dataclasses.replace(attention, query=attention.query[:, :, -1:])
        bare = dataclasses.replace(
            ctx,
            hidden=ctx.hidden if needs.hidden else None,
            attention=attention if needs.attention else None,
        )
        assert torch.equal(policy.select(bare), policy.select(ctx))


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_batching_does_not_change_the_choice(policy, case, kept_lists):
    """A sample alone, and in a batch that pads it: rows of queries and keys cut out of the batch's."""
    for ctx in each_stage(policy, case, {"images": ["tall", "two"]}):
        old = ctx.attention
        n = ctx.counts[0]
        alone = dataclasses.replace(
            old,
            **{name: getattr(old, name)[:1] for name in ("query", "key", "last", "rows", "key_mask")},
            columns=old.columns[:1, :n],
            rope=(old.rope[0][:1], old.rope[1][:1]),
        )
        cut = {name: getattr(ctx, name)[:1, :n] for name in ("mask", "ordinals", "positions", "hidden")}
        one = dataclasses.replace(ctx, **cut, counts=ctx.counts[:1], grids=ctx.grids[:1], attention=alone)
        assert kept_lists(policy.select(one))[0] == kept_lists(policy.select(ctx))[0]


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_is_a_value(policy):
    names = {name: getattr(policies, name) for name in policies.__all__} | {"every_other": every_other}
    for copy in (pickle.loads(pickle.dumps(policy)), eval(repr(policy), names)):
        assert copy == policy and hash(copy) == hash(policy) and copy is not policy
    field = dataclasses.fields(policy)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(policy, field, getattr(policy, field))
    assert policy.layers == tuple(sorted(set(policy.layers)))
    assert type(policy).summary


def test_no_two_policies_are_equal():
    assert len(set(POLICIES)) == len(POLICIES)
