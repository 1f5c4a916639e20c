"""Tokens that go, each given in shares to a few others (FiCoCo)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlmprune import ops
from vlmprune.constants import whole_numbers
from vlmprune.policies.choose import best_among, marks


def shares(logits: Tensor, dropped: Tensor, receive: Tensor, counts: Sequence[int], epsilon: float) -> Tensor:
    """How much of each dropped token every other one is given: ``[B, r, N]`` float32, of sum 1, or 0 where none may receive.

    Only these rows of all pairs are made.

    Args:
        logits: ``[B, r, N]``, of whose highest ones it is the softmax; ties go to the lower number.
        dropped: ``[B, r]`` int64, which tokens the rows are of, -1 = padding. To itself none gives.
        receive: ``[B, N]`` bool, which tokens may receive.
        counts: how many tokens each sample has.
        epsilon: of a row those above this quantile receive: ``n - 1 - int(epsilon (n - 1))`` of n tokens.
    """
    (B, r), N = dropped.shape, receive.shape[1]
    itself = torch.arange(N, device=dropped.device) == dropped[..., None]
    may = (receive[:, None] & ~itself & (dropped >= 0)[..., None]).flatten(0, 1)
    logits = logits.flatten(0, 1)
    few = [max(0, n - 1 - int(epsilon * (n - 1) + 1e-6)) for n in counts]
    limit = whole_numbers(tuple(few), dropped.device)[:, None].expand(-1, r).flatten()
    chosen = marks(best_among(logits, limit, may)[:, : max(few)], N)
    weights = logits.masked_fill(~chosen, -torch.inf).softmax(-1)
    return weights.masked_fill(~chosen.any(1, keepdim=True), 0.0).view(B, r, N)


def given(
    hidden: Tensor, index: Tensor, dropped: Tensor, weights: Tensor, mean: bool
) -> tuple[Tensor, Tensor]:
    """The tokens that stay, with what they are given added; what is given to dropped tokens is lost.

    Args:
        hidden: ``[B, N, D]``.
        index: ``[B, K]`` int64, the tokens that stay, -1 = padding.
        dropped: ``[B, r]`` int64, those that go, -1 = padding.
        weights: ``[B, r, N]`` float32: ``shares``.
        mean: whether rows become weighted means of what they were, of weight 1, and what they gain.

    Returns:
        Rows ``[B, K, D]``, and the kept token that each dropped one gave most to, ``[B, N]`` int64, -1 = none.
    """
    N, r = hidden.shape[1], dropped.shape[1]
    rows, gone = (ops.gather_tokens([hidden], at)[0].float() for at in (index, dropped))
    gains = weights.gather(2, index.clamp(min=0)[:, None].expand(-1, r, -1))
    gains = gains.masked_fill((index < 0)[:, None], 0.0)
    rows = rows + gains.transpose(1, 2) @ gone
    if mean:
        rows = rows / (1 + gains.sum(1))[..., None]
    most, place = gains.max(2)
    into = torch.where(most > 0, index.gather(1, place), -1)
    merged = torch.full((len(hidden), N + 1), -1, dtype=torch.int64, device=index.device)
    merged = merged.scatter(1, torch.where(dropped < 0, N, dropped), into)[:, :N]
    return rows.to(hidden.dtype), merged
