"""SparseVLM+ against its formula: correction by the RoPE kernel in closed form, priority heads, counts."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers.contexts import attention_row, case, kept_lists, text_case, top
from vlmprune.policies.base import Needs
from vlmprune.policies.methods.sparsevlm_plus import SparseVLMPlus, rope_kernel
from vlmprune.policies.parts.raters import rater_weights
from vlmprune.policies.schedule import stage_counts

CASES = [
    pytest.param({"images": ["square"]}, id="one-image"),
    pytest.param({"images": ["tall"], "stretch": 1.3}, id="stretched-rope"),
    pytest.param({"images": ["two", "none", "tall"]}, id="ragged"),
    pytest.param({"images": ["two", "tall"], "past": True}, id="cached-past"),
    pytest.param({"images": ["square", "two"], "few_values": True}, id="ties"),
    pytest.param({"images": ["two"], "kept": [[0, 3, 7, 20, 21, 22, 30, 34]]}, id="after-a-stage"),
    pytest.param({"images": [((1, 1),), ((1, 2),)]}, id="one-token"),
]


def kernel(distance, D, base, stretch=1.0):
    """R = stretch^2 / sqrt(D) * sum_f 2 cos(distance * base^(-2f/D))."""
    waves = (2 * math.cos(distance * base ** (-2 * f / D)) for f in range(D // 2))
    return stretch**2 * sum(waves) / math.sqrt(D)


def safe(distance, D, base, stretch=1.0):
    """R, or R(0) / 20 where it is not more than R(0) / 1000."""
    own, most = kernel(distance, D, base, stretch), kernel(0, D, base, stretch)
    return own if own > most / 1000 else most / 20


def slow_scores(made, sample, settings, heads):
    """Sum over raters and priority heads of A / R, with distances from the prompt's positions."""
    seen, stretch = made.ctx.attention, settings.get("stretch", 1.0)
    raters = rater_weights(made.ctx)[sample].nonzero().flatten().tolist()
    columns = [p for p in made.ctx.positions[sample].tolist() if p >= 0]
    per_head = np.zeros((seen.query.shape[1], len(columns)))
    for h in range(per_head.shape[0]):
        for i in raters:
            row = attention_row(made, sample, seen.rows[sample, i].item(), h)
            for j, position in enumerate(columns):
                distance = 0 if settings.get("few_values") else made.ctx.text[sample, i].item() - position
                per_head[h, j] += row[j] / safe(distance, 16, 100.0, stretch)
    total = per_head.sum(1).round(9)
    first = sorted(range(len(total)), key=lambda h: (-total[h], h))[:heads]
    return per_head[first].sum(0).round(10)


@pytest.mark.parametrize("settings", CASES)
@pytest.mark.parametrize("keep, heads", [(5, 2), (0.5, 14), (3, 1)])
def test_equals_the_formula(settings, keep, heads):
    made = text_case(**settings, layer=7)
    got = kept_lists(SparseVLMPlus(keep=(1, keep, 1), heads=heads).select(made.ctx))
    for sample, n in enumerate(made.ctx.counts):
        count = int(n * keep) if isinstance(keep, float) else keep * len(made.ctx.grids[sample])
        scores = slow_scores(made, sample, settings, heads)
        best = top(scores, min(n, max(1, min(count, n - 1))))
        if settings.get("few_values"):  # an ulp may tell equal tokens apart: no better one goes
            close = scores.round(6)
            assert len(got[sample]) == len(best) and sorted(close[got[sample]]) == sorted(close[best])
        else:
            assert got[sample] == best


def test_no_text_after_the_image():
    """Tokens spread evenly stay, as in SparseVLM; a neighbour with text keeps what it keeps alone."""
    policy = SparseVLMPlus(layers=(2,), keep=(9,), heads=2)
    mixed, sound, alone = (
        text_case(["square"] * len(after), after=after).ctx for after in ([5, 0], [5, 5], [0])
    )
    even = [3, 8, 11, 16, 19, 21, 24, 29, 32]
    assert kept_lists(policy.select(alone)) == [even]
    assert kept_lists(policy.select(mixed))[1] == even
    assert len(kept_lists(policy.select(sound))[1]) == 9 and kept_lists(policy.select(sound))[1] != even


def test_the_cases_reach_what_is_not_positive():
    """At the distances of the cases the kernel of the tests is replaced, so the formula above tests it."""
    assert min(kernel(d, 16, 100.0) for d in range(40)) < 0


def far_apart(distances, D=128, base=10000.0):
    """Attention inputs with one row, and a column at each distance from it."""
    seen = case(["square"]).ctx.attention
    at = torch.tensor([max(distances)] + [max(distances) - d for d in distances], dtype=torch.float64)[None]
    angle = at[..., None] * base ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
    angle = torch.cat([angle, angle], -1)
    index = torch.arange(1, len(distances) + 1)[None]
    return replace(
        seen,
        key=torch.zeros(1, 1, at.shape[1], D),
        rows=torch.zeros(1, 1, dtype=torch.int64),
        columns=index,
        rope=(angle.cos().float(), angle.sin().float()),
    )


@pytest.mark.parametrize("D, first", [(64, 725), (128, 1707)])
def test_released_kernel_as_long_as_it_is_positive(D, first):
    """Base 10000, every distance: the released formula before the first that is not positive, finite and positive after it."""
    plain = [kernel(d, D, 10000.0) for d in range(first + 1)]
    assert min(plain[:first]) > 0 >= plain[first]
    got = rope_kernel(far_apart(range(4097), D))[0, 0].cpu()
    np.testing.assert_allclose(got[:first].numpy(), plain[:first], rtol=1e-4, atol=2e-6)
    assert got[first] == pytest.approx(plain[0] / 20)
    assert got.isfinite().all() and (got > 0.0009 * plain[0]).all()
    far = [2629, 4096]
    np.testing.assert_allclose(got[far].numpy(), [safe(d, D, 10000.0) for d in far], rtol=1e-4)


def test_published_values():
    np.testing.assert_allclose(
        rope_kernel(far_apart([0, 1, 100, 600, 1000]))[0, 0].cpu().numpy(),
        [11.31, 10.98, 5.40, 2.35, 1.80],
        atol=0.005,
    )


@pytest.mark.parametrize(
    "tokens, after, mean",
    [
        (192, (300, 200, 118), 206.8),
        (128, (238, 108, 60), 144.1),
        (96, (246, 54, 28), 113.9),
        (64, (66, 34, 20), 81.8),
    ],
)
def test_published_counts(tokens, after, mean):
    assert stage_counts(SparseVLMPlus(tokens=tokens), 576) == list(zip((3, 7, 16), after, strict=True))
    a, b, c = after
    assert abs((3 * 576 + 4 * a + 9 * b + 16 * c) / 32 - mean) <= 0.05 + 1e-9


def test_needs_no_hidden_states():
    assert SparseVLMPlus().needs(3) == Needs(attention="previous", rows="text", embeds=True)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"tokens": 100}, r"^tokens: expected one of 192, 128, 96, 64, or an explicit keep, got 100$"),
        ({"heads": 0}, r"^heads: expected a whole number >= 1, got 0$"),
        ({"layers": (7, 3)}, r"^layers: expected one or more layers, ascending, got \(7, 3\)$"),
        ({"layers": (0, 3)}, r"^layer: expected a whole number >= 1 \(the score .*\), got 0$"),
        ({"keep": (5,)}, r"^keep: expected 3 counts, one per layer, got \(5,\)$"),
    ],
)
def test_rejects(settings, message):
    with pytest.raises(ValueError, match=message):
        SparseVLMPlus(**settings)
