"""DART against its procedure in plain loops: pivots by key norm, then the least similar tokens of each in turn."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers.contexts import kept_lists, text_case, top
from vlmprune.policies.base import Needs
from vlmprune.policies.dart import DART
from vlmprune.policies.schedule import stage_counts

CASES = [
    pytest.param({"images": ["square"]}, id="one-image"),
    pytest.param({"images": ["tall"], "stretch": 1.3}, id="stretched-rope"),
    pytest.param({"images": ["two", "none", "tall"]}, id="ragged"),
    pytest.param({"images": ["two", "tall"], "past": True}, id="cached-past"),
    pytest.param({"images": ["two"], "kept": [[0, 3, 7, 20, 21, 22, 30, 34]]}, id="after-a-stage"),
    pytest.param({"images": [((1, 1),), ((1, 2),), ((2, 3),)]}, id="few-tokens"),
]


def cosine(a, b):
    return float(a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-12))


def slow_dart(made, sample, keep, pivots, count):
    """The kept tokens, following the released procedure with pivots in the order of the prompt."""
    seen, n = made.ctx.attention, made.ctx.counts[sample]
    rotated = seen.key[sample].double().cpu().numpy()
    plain = made.key[sample].double().cpu().numpy()
    columns = [c for c in seen.columns[sample].tolist() if c >= 0]
    words = [r for r in seen.rows[sample].tolist() if r >= 0]
    hidden = made.ctx.hidden[sample].double().cpu().numpy()
    norms = [np.abs(rotated[:, c]).sum() for c in columns]
    total = min(
        n, max(1, int(n * keep + 1e-6)) if isinstance(keep, float) else keep * len(made.ctx.grids[sample])
    )
    first = min(pivots[0], n if count == "released" else total)
    chosen = top(norms, first)
    texts = [words[i] for i in top([np.abs(rotated[:, w]).sum() for w in words], pivots[1])]
    if count == "released":
        shares = [total // sum(pivots)] * sum(pivots)
        total = min(n, max(1, first + sum(shares)))
    else:
        share, extra = divmod(total - first, sum(pivots))
        shares = [share + (i < extra) for i in range(sum(pivots))]
    kept = list(chosen)
    takers = [(i, [cosine(hidden[p], hidden[j]) for j in range(n)]) for i, p in enumerate(chosen)]
    for i, word in enumerate(texts):
        near = [cosine(plain[:, word].ravel(), plain[:, c].ravel()) for c in columns]
        takers.append((pivots[0] + i, near))
    for i, near in takers:
        free = [j for j in range(n) if j not in kept]
        kept += [free[f] for f in top([-near[j] for j in free], shares[i])]
    free = [j for j in range(n) if j not in kept]
    kept += [free[f] for f in top([norms[j] for j in free], total - len(kept))]
    return sorted(kept)


@pytest.mark.parametrize("settings", CASES)
@pytest.mark.parametrize("count", ["released", "exact"])
@pytest.mark.parametrize(
    "keep, pivots", [(16, (4, 4)), (0.5, (2, 1)), (3, (4, 4)), (11, (0, 9)), (10, (3, 0)), (1.0, (4, 4))]
)
def test_equals_the_procedure(settings, count, keep, pivots):
    made = text_case(**settings, layer=2)
    index = DART(keep=keep, pivots=pivots, count=count).select(made.ctx)
    got = kept_lists(index)
    for sample in range(len(got)):
        assert got[sample] == slow_dart(made, sample, keep, pivots, count)
    assert index.shape[1] == max(map(len, got))


def test_equal_tokens():
    """Constant features: every choice is a tie, and goes to the lower position."""
    made = text_case(["square"])
    seen = replace(made.ctx.attention, key=torch.ones_like(made.ctx.attention.key))
    ctx = replace(made.ctx, hidden=torch.ones_like(made.ctx.hidden), attention=seen)
    assert kept_lists(DART(keep=16, pivots=(4, 0)).select(ctx)) == [list(range(20))]


def test_a_sample_with_fewer_tokens_than_pivots_keeps_one():
    """No visual pivot, and less than one token for each text pivot: the one of largest key norm stays."""
    made = text_case([((1, 2),), ((2, 3),)])
    policy, norms = DART(keep=3, pivots=(0, 4)), made.ctx.attention.key.abs().sum((1, 3))
    best = norms.gather(1, made.ctx.attention.columns.clamp(min=0)).masked_fill(~made.ctx.mask, 0).argmax(1)
    assert kept_lists(policy.select(made.ctx)) == [[i] for i in best.tolist()]


@pytest.mark.parametrize("count", ["released", "exact"])
@pytest.mark.parametrize("pivots", [(2, 2), (0, 4)])
def test_no_text_after_the_image(count, pivots):
    """Visual pivots take their share, key norms decide on the text pivots' share; a neighbour keeps its own."""
    mixed = text_case(["square", "tall"], after=[0, 5])
    got = kept_lists(DART(keep=9, pivots=pivots, count=count).select(mixed.ctx))
    assert got == [slow_dart(mixed, sample, 9, pivots, count) for sample in (0, 1)]
    alone = text_case(["square"], after=[0])
    assert alone.ctx.text.shape == (1, 0)
    got = kept_lists(DART(keep=9, pivots=pivots, count=count).select(alone.ctx))
    assert got == [slow_dart(alone, 0, 9, pivots, count)]


def test_published_counts():
    """The README's 128 tokens of 576: sixteen for each of 8 pivots, and the 4 visual pivots themselves."""
    assert stage_counts(DART(), 576) == [(2, 132)]
    assert stage_counts(DART(count="exact"), 576) == [(2, 128)]
    assert stage_counts(DART(keep=0.222), 576) == [(2, 4 + 8 * 15)]


def test_needs():
    keys = DART().needs(2)
    assert keys == Needs(hidden=True, attention="previous", rows="text", keys_only=True)
    assert (keys | Needs(hidden=True)).keys_only
    assert not (keys | Needs(attention="previous")).keys_only


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"layer": 0}, r"^layer: expected a whole number >= 1 \(the keys .*\), got 0$"),
        (
            {"keep": 0},
            r"^keep: expected a share in \(0, 1\] or a whole number of tokens per image >= 1, got 0$",
        ),
        (
            {"pivots": (0, 0)},
            r"^pivots: expected a number of visual and one of text pivots, not both 0, got \(0, 0\)$",
        ),
        ({"pivots": (4,)}, r"^pivots: expected a number of visual"),
        ({"pivots": (4, -1)}, r"^pivots: expected a number of visual"),
        ({"count": "all"}, r"^count: expected 'released' or 'exact', got 'all'$"),
    ],
)
def test_rejects(settings, message):
    with pytest.raises(ValueError, match=message):
        DART(**settings)
