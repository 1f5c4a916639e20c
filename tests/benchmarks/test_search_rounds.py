"""How often the search for the last kept key counts: the latency model's number, and never more than it says itself."""

import math

import pytest
import torch
import triton
from latency import cards

from helpers import select_cases
from vlmprune.triton_kernels import select_topk

pytestmark = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="counted in the interpreter: a GPU does not say"
)


@pytest.fixture
def rounds(monkeypatch):
    """Rounds that keeping ``keep`` of some scores takes."""
    count, calls = select_topk._count_from, []
    monkeypatch.setattr(select_topk, "_count_from", lambda *args: calls.append(1) or count(*args))

    def of(scores, keep):
        calls.clear()
        select_topk.select_topk(scores[None], keep, None, keep)
        return len(calls)

    return of


def test_rounds_of_attention_are_the_models(rounds):
    """Scores as of the benchmark: means over heads of softmax over logits of variance 1."""
    g, doublings = torch.Generator().manual_seed(0), []
    for N, keep, heads in ((576, 64, 32), (2880, 320, 32), (4096, 1024, 28), (16384, 2048, 28)):
        draws = [torch.randn(heads, N, generator=g).softmax(1).mean(0) for _ in range(12)]
        counts = [rounds(scores, keep) for scores in draws]
        doublings.append(sum(counts) / len(counts) / math.log2(N))
    expected = cards.STEPS["rounds"]
    assert all(expected.better < x < expected.worse for x in doublings), doublings
    assert sum(doublings) / len(doublings) == pytest.approx(expected.typical, rel=0.1)


@pytest.mark.parametrize("keep", [1, 2, 100, 1000, 1998, 1999])
def test_rounds_have_a_limit(rounds, keep):
    """Where interpolation is at its worst."""
    counts = [rounds(scores, keep) for scores in select_cases.uneven(2000)]
    assert max(counts) <= 80, counts


def test_equal_scores_need_no_round(rounds):
    assert rounds(torch.ones(500), 100) == 0
    assert rounds(torch.rand(500), 500) == 0
    assert rounds(torch.rand(500), 0) == 0
