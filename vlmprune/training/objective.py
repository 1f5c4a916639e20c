"""What is learned, as formulas: how far a captioned prompt is from the full one, which caption that praises, and how much.

From the released training code of ACCM (ACM MM 2025); DPO (arXiv 2305.18290) is a choice of ours.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

Weighting = Literal["batch", "sample"]


class Verdict(NamedTuple):
    """Which candidates did well.

    Attributes:
        best, worst: ``[B]`` int64, the candidate nearest to the full prompt's answer and the farthest; of equals the first.
        margin: ``[B]`` float32, by how much the best is nearer than the mean of all; never negative.
    """

    best: Tensor
    worst: Tensor
    margin: Tensor


def answer_kl(reference: Tensor, logits: Tensor, counts: Tensor) -> Tensor:
    """KL(reference || other) at each position of an answer, in nats: summed over the vocabulary, mean over positions.

    Args:
        reference: ``[B, n, V]`` log-probabilities, float32.
        logits: ``[B, n, V]`` of any float dtype; computed in float32.
        counts: ``[B]`` int64, how many of the n positions, from the left, are the answer's; at least 1.

    Returns:
        ``[B]`` float32.
    """
    other = logits.float().log_softmax(-1)
    each = F.kl_div(other, reference, reduction="none", log_target=True).sum(-1)
    inside = torch.arange(each.shape[1], device=each.device) < counts[:, None]
    # Rounding may leave a divergence a little below zero.
    return each.where(inside, 0).sum(1).clamp(min=0) / counts


def judge(kl: Tensor) -> Verdict:
    """Rate candidates by their divergences ``[B, k]``."""
    best, worst = kl.argmin(1), kl.argmax(1)
    margin = kl.mean(1) - kl.gather(1, best[:, None])[:, 0]
    return Verdict(best, worst, margin.clamp(min=0))


def weighted(losses: Tensor, counts: Tensor, margin: Tensor, weighting: Weighting) -> Tensor:
    """One loss of a batch, by how much its best candidates were better.

    "batch": the mean over all tokens, times the sum of the margins; that sum is the paper's ``4 * mean`` at its batch of
    four. "sample": every sample's mean loss times its own margin, summed; the same where all margins are.

    Args:
        losses: ``[B]`` each sample's loss, summed over its tokens.
        counts: ``[B]`` its tokens.
        margin: ``[B]`` from ``judge``.
        weighting: which.

    Returns:
        A scalar.
    """
    if weighting == "batch":
        return margin.sum() * losses.sum() / counts.sum()
    return (margin * losses / counts).sum()


def preference_loss(better: Tensor, worse: Tensor, beta: float) -> Tensor:
    """DPO: ``-log sigmoid(beta * (better - worse))``, mean over samples.

    Args:
        better: ``[B]`` log-likelihood of the preferred text, less that of the frozen reference.
        worse: ``[B]`` the same of the rejected text.
        beta: how strongly the reference holds; larger = stays nearer.

    Returns:
        A scalar.
    """
    return -F.logsigmoid(beta * (better - worse)).mean()
