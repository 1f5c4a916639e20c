"""Budgets that the data share out, against a slow handing out of tokens one by one."""

import random
from dataclasses import replace

import pytest
import torch

from helpers.contexts import kept_lists, named
from vlmprune.policies import crops_of, ranked
from vlmprune.policies.methods.random import Random
from vlmprune.policies.parts.apportion import apportioned
from vlmprune.testing.context import make_case


def slow(sizes, scores, grants, weights, total):
    """Places of what stays of one prompt whose groups have so many tokens, ascending."""
    firsts = [sum(sizes[:i]) for i in range(len(sizes))]
    lines = [sorted(range(n), key=lambda t, i=i: (-scores[i][t], t)) for i, n in enumerate(sizes)]
    taken = [(i, t) for i, n in enumerate(sizes) for t in range(min(n, grants[i]))]
    if len(taken) > total:  # the first ones in the order of the prompt
        places = sorted(firsts[i] + lines[i][t] for i, t in taken)
        return places[:total]
    turn = sorted(range(len(sizes)), key=lambda i: (-weights[i], i))
    extra = 0
    while len(taken) < min(total, sum(sizes)):
        for i in turn:
            if grants[i] + extra < sizes[i] and len(taken) < total:
                taken.append((i, grants[i] + extra))
        extra += 1
    return sorted(firsts[i] + lines[i][t] for i, t in taken)


@pytest.mark.parametrize("seed", range(20))
def test_equals_the_handing_out(seed):
    draw = random.Random(seed)
    grids = [[(2, draw.randint(1, 4)) for _ in range(draw.randint(1, 4))] for _ in range(3)]
    ctx = replace(make_case(grids, 0).ctx, sizes=tuple((sum(r * c for r, c in own),) for own in grids))
    crops, keep = crops_of(ctx), draw.choice([1, 3, 7, 1000])
    scores = torch.tensor([[draw.randint(0, 3) for _ in range(max(crops.tokens))] for _ in crops.tokens])
    grants = [draw.randint(0, n + 1) for n in crops.tokens]
    weights = [draw.choice([0.0, 0.5, 2.0]) for _ in crops.tokens]
    by = apportioned(crops, scores.float(), torch.tensor(grants), torch.tensor(weights))
    got = kept_lists(ranked(ctx, Random(keep=keep, spend="prompt"), by).index(ctx))
    for sample in range(3):
        here = [i for i, own in enumerate(crops.samples) if own == sample]
        own = ([x[i] for i in here] for x in (crops.tokens, scores.tolist(), grants, weights))
        assert got[sample] == slow(*own, min(keep, ctx.counts[sample]))


def test_what_is_not_a_number_comes_last():
    ctx = replace(make_case(named([((2, 2), (2, 2))]), 0).ctx, sizes=((8,),))
    scores = torch.tensor([[1.0, float("nan"), 2, float("-inf")], [float("nan")] * 4])
    weights = torch.tensor([float("nan"), 0.0])
    by = apportioned(crops_of(ctx), scores, torch.tensor([2, 1]), weights)
    kept = [ranked(ctx, Random(keep=k, spend="prompt"), by).index(ctx)[0].tolist() for k in (3, 4, 5)]
    assert kept == [[0, 2, 4], [0, 2, 4, 5], [0, 1, 2, 4, 5]]
