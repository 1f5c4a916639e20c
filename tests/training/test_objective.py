"""The formulas against others' hands: probabilities, loops, and what must hold of them."""

import math

import pytest
import torch

from vlmprune.training.objective import answer_kl, judge, preference_loss, weighted


def test_kl_by_hand():
    """One position, three words: Q = (1/2, 1/4, 1/4) against P = (1/4, 1/2, 1/4)."""
    reference, logits = (torch.tensor([[[*row]]]).log() for row in ((0.5, 0.25, 0.25), (0.25, 0.5, 0.25)))
    want = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    torch.testing.assert_close(answer_kl(reference, logits + 7, torch.tensor([1])), torch.tensor([want]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kl_is_a_mean_over_each_samples_own_positions(dtype):
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 50, generator=draw).to(dtype)
    counts = [4, 1, 3]
    reference = logits[0].float().log_softmax(-1)
    got = answer_kl(reference, logits[1], torch.tensor(counts))
    for sample, count in enumerate(counts):
        q, p = (side[sample, :count].double().softmax(-1) for side in logits)
        want = (q * (q / p).log()).sum() / count
        assert got[sample].item() == pytest.approx(want.item(), rel=1e-5)
    assert torch.equal(answer_kl(reference, logits[0], torch.tensor(counts)), torch.zeros(3))


def test_the_best_is_the_nearest_and_its_margin_what_it_is_nearer_than_the_mean():
    found = judge(torch.tensor([[3.0, 1.0, 2.0], [5.0, 5.0, 5.0], [0.0, 0.5, 4.0]]))
    assert found.best.tolist() == [1, 0, 0] and found.worst.tolist() == [0, 0, 2]
    torch.testing.assert_close(found.margin, torch.tensor([1.0, 0.0, 1.5]))


def test_weights_are_the_released_ones_at_a_batch_of_four():
    losses, counts = torch.tensor([2.0, 3.0, 4.0, 5.0]), torch.tensor([1, 2, 3, 1])
    margin = torch.tensor([0.1, 0.2, 0.0, 0.3])
    want = 4 * margin.mean() * (losses.sum() / counts.sum())
    torch.testing.assert_close(weighted(losses, counts, margin, "batch"), want)
    want = sum(m * loss / n for m, loss, n in zip(margin, losses, counts, strict=True))
    torch.testing.assert_close(weighted(losses, counts, margin, "sample"), want)


def test_equal_margins_and_lengths_weigh_alike_both_ways():
    losses, counts, margin = torch.rand(5), torch.full((5,), 7), torch.full((5,), 0.3)
    both = [weighted(losses, counts, margin, how) for how in ("batch", "sample")]
    torch.testing.assert_close(*both)


def test_preference_loss_by_hand():
    better, worse = torch.tensor([1.0, -2.0]), torch.tensor([0.0, 2.0])
    want = -(math.log(1 / (1 + math.exp(-0.1))) + math.log(1 / (1 + math.exp(0.4)))) / 2
    assert preference_loss(better, worse, 0.1).item() == pytest.approx(want)
    assert preference_loss(worse, worse, 0.1).item() == pytest.approx(math.log(2))
