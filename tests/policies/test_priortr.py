"""PriorTR against its formula in loops: the question's attention, that of the token behind the image, p log(p / q)."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from helpers.contexts import attention_row, kept_lists, text_case, top
from vlmprune.policies import Needs, PriorTR

CASES = [
    pytest.param({"images": ["square"]}, id="one-image"),
    pytest.param({"images": ["two", "tall"]}, id="ragged"),
    pytest.param({"images": ["two", "tall"], "past": True}, id="cached-past"),
    pytest.param({"images": ["square", "tall"], "few_values": True}, id="ties"),
    pytest.param({"images": ["two"], "kept": [[0, 3, 7, 20, 21, 30, 34]]}, id="after-a-stage"),
    pytest.param({"images": [((1, 1),), "tall"]}, id="one-token"),
]


def slow_scores(made, sample, rows, heads, null):
    """From each head's softmax row: rows reduced first, heads after; both divided by their sums."""
    texts = [r for r in made.ctx.attention.rows[sample].tolist() if r >= 0]

    def share(some):
        per_head = [
            np.mean([attention_row(made, sample, r, h) for r in some], 0)
            for h in range(made.ctx.attention.query.shape[1])
        ]
        paid = np.mean(per_head, 0) if heads == "mean" else np.max(per_head, 0)
        return paid / (paid.sum() + 1e-10)

    p = share(texts if rows == "text" else texts[-1:])
    if null + 1 >= len(texts):
        return p.tolist()
    q = share([texts[null]])
    return [a * math.log((a + 1e-10) / (b + 1e-10)) for a, b in zip(p, q, strict=True)]


@pytest.mark.parametrize("settings", CASES)
@pytest.mark.parametrize(
    "asked",
    [{}, {"rows": "last"}, {"heads": "max", "null": 1}, {"rows": "last", "heads": "max"}, {"null": 40}],
    ids=str,
)
@pytest.mark.parametrize("keep", [0.3, 1, 1.0])
def test_equals_the_formula(settings, asked, keep):
    made = text_case(**settings)
    policy = PriorTR(layer=2, keep=keep, **asked)
    got = kept_lists(policy.select(made.ctx))
    for sample, n in enumerate(made.ctx.counts):
        count = policy.kept(n, len(made.ctx.grids[sample]), 2)
        scores = slow_scores(made, sample, policy.rows, policy.heads, policy.null)
        assert len(got[sample]) == count
        # equal keys tie but for an ulp: nothing better goes
        close = np.round(scores, 6)
        assert sorted(close[got[sample]]) == sorted(close[top(scores, count)])
        if not settings.get("few_values"):
            assert got[sample] == top(scores, count)


def test_a_null_token_with_no_question_behind_it_is_no_prior():
    """p is q, and every token would score 0, but for noise: it goes by p."""
    made = text_case(["square"])
    seen = made.ctx.attention
    alone = replace(made.ctx, attention=replace(seen, rows=seen.rows[:, :1]))
    p = [sum(attention_row(made, 0, int(seen.rows[0, 0]), h)[j] for h in range(4)) for j in range(36)]
    assert kept_lists(PriorTR(layer=2, keep=4).select(alone)) == [top(p, 4)]


def test_a_sample_without_text_behind_its_image_keeps_tokens_spread_evenly():
    made = text_case(["square", "square"], after=[0, 5])
    alone = text_case(["square"], after=[0])
    for rows in ("text", "last"):
        one, other = (PriorTR(layer=2, keep=6, rows=rows).select(m.ctx)[0].tolist() for m in (made, alone))
        assert one == other
        assert max(b - a for a, b in pairwise(one)) <= 10


def test_a_broken_sample_keeps_its_first_tokens():
    made = text_case(["square", "tall"])
    seen = made.ctx.attention
    query = seen.query.clone()
    query[0] = torch.nan
    broken = replace(made.ctx, attention=replace(seen, query=query))
    whole, got = (kept_lists(PriorTR(layer=2, keep=5).select(ctx)) for ctx in (made.ctx, broken))
    assert got == [[0, 1, 2, 3, 4], whole[1]]


def test_needs_the_text_rows():
    assert PriorTR().needs(3) == Needs(attention="previous", rows="text")


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"layer": 0},
            r"^layer: expected a whole number >= 1 \(the score comes from the layer before\), got 0$",
        ),
        ({"keep": 0.0}, r"^keep: expected a share in \(0, 1\] or a whole number .* >= 1, got 0\.0$"),
        ({"rows": "all"}, r"^rows: expected 'text' or 'last', got 'all'$"),
        ({"heads": "sum"}, r"^heads: expected 'mean' or 'max', got 'sum'$"),
        ({"null": -1}, r"^null: expected a whole number >= 0, got -1$"),
        ({"spend": "token"}, r"^spend: expected 'prompt', 'image' or 'crop', got 'token'$"),
    ],
)
def test_rejects(settings, message):
    with pytest.raises(ValueError, match=message):
        PriorTR(**settings)


def test_says_what_the_wiring_forgot():
    bare = replace(text_case(["square"]).ctx, attention=None)
    with pytest.raises(ValueError, match=r"^ctx\.attention: expected query and key"):
        PriorTR().select(bare)
