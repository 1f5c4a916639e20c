"""LVLM_CSP: clusters by its three rules, all tokens in the middle, then the most attended, each in loops of its own."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers.contexts import case, kept_lists, top
from vlmprune.errors import InputError
from vlmprune.policies import LVLMCSP, FasterVLM, Needs, Random
from vlmprune.policies.registry import BUILT_IN
from vlmprune.testing.context import make_context

IMAGES = [[(4, 5), (5, 4)], [], [(2, 10)], [(1, 1), (3, 3)]]


def counted(share, n):
    return min(n, max(1, int(share * n)) if isinstance(share, float) else share)


def sizes(images):
    return [rows * columns for rows, columns in images]


@pytest.mark.parametrize("cluster", [1, 3, 6, 7, 13, 19, 20, 50, 0.05, 0.37, 0.5, 1.0])
def test_uniform_clusters(cluster):
    """S[i] = i * floor(N / N_c) in every image, i = 0 ... N_c - 1."""
    policy = LVLMCSP(cluster=cluster)
    ctx = make_context(policy.needs(0), IMAGES, 0)
    for got, images in zip(kept_lists(policy.select(ctx)), IMAGES, strict=True):
        want, first = [], 0
        for n in sizes(images):
            k = counted(cluster, n)
            want += [first + i * (n // k) for i in range(k)]
            first += n
        assert got == want


def test_random_clusters_are_those_of_random_in_every_image():
    policy = LVLMCSP(cluster=6, by="random", seed=3)
    ctx = make_context(policy.needs(0), IMAGES, 0)
    want = Random(layer=0, keep=6, seed=3, spend="image").select(ctx)
    assert torch.equal(policy.select(ctx), want)
    assert not torch.equal(replace(policy, seed=4).select(ctx), want)


def cls_scores(seen, crop, tokens):
    """mean over heads of softmax(q_cls k / sqrt(d)) over all keys, at the patches."""
    q, k = (x[crop].double().cpu().numpy() for x in (seen.query, seen.key))
    total = np.zeros(k.shape[1])
    for h in range(q.shape[0]):
        logits = k[h] @ q[h, 0] * seen.scale
        e = np.exp(logits - logits.max())
        total += e / e.sum() / q.shape[0]
    return total[1 : 1 + tokens].round(12)


@pytest.mark.parametrize("cluster", [1, 6, 0.37])
def test_clusters_by_cls(cluster):
    policy = LVLMCSP(cluster=cluster, by="cls")
    images = [[(4, 5), (5, 4)], [], [(2, 10)]]
    ctx = make_context(policy.needs(0), images, 0)
    crop = 0
    for got, own in zip(kept_lists(policy.select(ctx)), images, strict=True):
        want, first = [], 0
        for n in sizes(own):
            want += [first + i for i in top(cls_scores(ctx.vision[-2], crop, n), counted(cluster, n))]
            first, crop = first + n, crop + 1
        assert got == want
    same = FasterVLM(keep=6, positions="keep", spend="image").select(ctx)
    assert torch.equal(LVLMCSP(cluster=6, by="cls").select(ctx), same)


def test_all_come_back():
    policy = LVLMCSP(cluster=2, then=2)
    assert policy.needs(8) == Needs(restored=True)
    ctx = make_context(policy.needs(8), IMAGES, 8)
    assert kept_lists(policy.select(ctx)) == [[*range(n)] for n in ctx.counts]
    assert policy.rank(ctx).keeps_all(ctx.counts)


@pytest.mark.parametrize("then", [0.5, 0.13, 4])
@pytest.mark.parametrize("rows", ["last", "text"])
@pytest.mark.parametrize(
    "settings",
    [
        dict(images=["two", "none", "tall"]),
        dict(images=["two", "tall"], past=True),
        dict(images=["square", "tall"], few_values=True),
    ],
    ids=str,
)
def test_prunes_by_attention(settings, rows, then):
    """mean over the rows and heads of softmax(q k / sqrt(d)) over what each row sees, at the visual columns."""
    made = case(**settings)
    seen = made.ctx.attention
    text = torch.tensor([[*range(seen.key.shape[2] - 3, seen.key.shape[2])]] * len(seen.rows))
    ctx = replace(made.ctx, layer=12, attention=replace(seen, rows=text))
    got = kept_lists(LVLMCSP(then=then, rows=rows).select(ctx))
    for b, n in enumerate(ctx.counts):
        q, k = (x[b].double().cpu().numpy() for x in (seen.query, seen.key))
        columns = [c for c in seen.columns[b].tolist() if c >= 0]
        used = (seen.last if rows == "last" else text)[b].tolist()
        scores = np.zeros(len(columns))
        for row in used:
            for h in range(len(q)):
                logits = (
                    k[h // (len(q) // len(k))] @ q[h, row - (k.shape[1] - q.shape[1])] / np.sqrt(k.shape[2])
                )
                sees = (np.arange(k.shape[1]) <= row) & made.valid[b].cpu().numpy()
                e = np.where(sees, np.exp(logits), 0.0)
                scores += (e / e.sum())[columns] / len(q) / len(used)
        count = then * len(ctx.grids[b]) if isinstance(then, int) else max(1, int(then * n))
        assert got[b] == top(scores.round(12), min(n, count))


def test_what_it_reads():
    assert LVLMCSP().needs(0) == Needs() and LVLMCSP(by="cls", vision_layer=-1).needs(0) == Needs(
        vision=(-1,)
    )
    assert LVLMCSP(rows="text").needs(12) == Needs(attention="previous", rows="text")
    assert BUILT_IN["lvlm_csp"] is LVLMCSP and LVLMCSP(scatter=3, prune=5).layers == (0, 3, 5)


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            dict(cluster=0),
            "cluster: expected a share in (0, 1] or a whole number of tokens per image >= 1, got 0",
        ),
        (
            dict(then=2.0),
            "then: expected a share in (0, 1] or a whole number of tokens per image >= 1, got 2.0",
        ),
        (dict(scatter=0), "scatter: expected a whole number >= 1 (clusters are chosen at layer 0), got 0"),
        (dict(prune=8), "prune: expected a layer behind scatter=8, got 8"),
        (dict(by="seg"), "by: expected 'uniform', 'random' or 'cls', got 'seg'"),
        (dict(rows="seg"), "rows: expected 'last' or 'text', got 'seg'"),
        (dict(seed=-1), "seed: expected a whole number in [0, 2**63), got -1"),
    ],
)
def test_errors(settings, message):
    with pytest.raises(InputError) as raised:
        LVLMCSP(**settings)
    assert str(raised.value) == message
