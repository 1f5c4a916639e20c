"""Choices made one token after another, by a rule of the policy's own that ``ops.greedy_select`` has not."""

from __future__ import annotations

from collections.abc import Generator, Sequence

import torch
from torch import Tensor

from vlmprune.constants import whole_numbers
from vlmprune.policies.choose import marks

Rule = Generator[Tensor, Tensor, None]
"""Yields what each token ``[G, P]`` is worth if it is taken next, no NaN, and is sent the one ``[G]`` that was."""


def taken_in_turn(rule: Rule, kept: Sequence[int], mask: Tensor | None) -> Tensor:
    """Take again and again the token that is worth most: ``[G, K]`` places, ascending, -1 on the right; no host sync.

    Ties go to the lower place, and none is taken twice. The first choices do not depend on how many follow, so the rows share
    one run as long as the longest.

    Args:
        rule: what tokens are worth.
        kept: how many of each row, at most as many as it has.
        mask: ``[G, P]`` bool, False = padding; None = no padding.
    """
    worth, order = next(rule), list[Tensor]()
    G, P = worth.shape
    gone = torch.zeros_like(worth, dtype=torch.bool) if mask is None else ~mask
    for _ in range(max(kept, default=0)):
        best = worth.masked_fill(gone, float("-inf")).argmax(1)  # of equal values the first
        gone = gone.scatter(1, best[:, None], True)
        order.append(best)
        worth = rule.send(best)
    if not order:
        return torch.empty(G, 0, dtype=torch.int64, device=worth.device)
    index, turn = torch.stack(order, 1), torch.arange(len(order), device=worth.device)
    late = turn >= whole_numbers(tuple(kept), worth.device)[:, None]
    index = index.masked_fill(late, P).sort(dim=1).values
    return index.masked_fill(index == P, -1)


def farthest(x: Tensor, weights: Tensor, real: Tensor, counts: Sequence[int]) -> Tensor:
    """Marks ``[..., P]`` bool of ``counts[g]`` tokens of each of the G groups, chosen one after another.

    Each is the one of largest ``min_i w_j (1 - cos(x_i, x_j))`` over the chosen i; the first over all i, but for the least.

    Args:
        x: ``[..., P, D]``, G groups in all.
        weights: ``[..., P]``; NaN and infinities count as 0.
        real: ``[..., P]`` bool, False = padding.
    """
    shape, P = real.shape, real.shape[-1]
    unit, mask = unit_rows(x.reshape(-1, P, x.shape[-1]).nan_to_num(0.0, 0.0, 0.0)), real.reshape(-1, P)
    far = (1 - unit @ unit.mT) * weights.reshape(-1, 1, P).float().nan_to_num(0.0, 0.0, 0.0)
    far = far.masked_fill(~mask[..., None], float("inf"))
    return marks(taken_in_turn(_farthest(far), counts, mask), P).view(shape)


def _farthest(far: Tensor) -> Rule:
    """How far each token is from the nearest one taken, ``far [G, P, P]`` from each."""
    best = yield far.topk(min(2, far.shape[1]), dim=1, largest=False).values[:, -1]
    nearest = torch.full_like(far[:, 0], float("inf"))
    while True:
        row = far.gather(1, best[:, None, None].expand(-1, 1, far.shape[2]))[:, 0]
        nearest = torch.minimum(nearest, row)
        best = yield nearest


def covering(weights: Tensor) -> Rule:
    """How much more of the rows of ``weights [G, R, P]`` each token would cover: a row by the largest weight taken from it."""
    covered = torch.zeros_like(weights[:, :, :1])
    while True:
        best = yield (weights - covered).clamp(min=0).sum(1)
        column = weights.gather(2, best[:, None, None].expand(-1, weights.shape[1], 1))
        covered = torch.maximum(covered, column)


def apart(unit: Tensor, weight: Tensor) -> Rule:
    """``weight [G, P]``, from the second choice on times 1 - cosine, by ``unit [G, P, D]``, with the nearest one taken."""
    best = yield weight
    gap = torch.full_like(weight, 2.0)
    while True:
        row = unit.gather(1, best[:, None, None].expand(-1, 1, unit.shape[2]))
        gap = torch.minimum(gap, (1 - (row @ unit.mT)[:, 0]).clamp(min=0))
        best = yield weight * gap


def outlived(close: Tensor) -> Tensor:
    """Which tokens ``[G, P]`` bool fall to an earlier one that stands, where ``close[g, i, j]``: i removes a later j.

    In the order of the places: a token that has fallen removes nothing. P short steps, so that nothing waits for the device.

    Example:
        >>> chain = torch.ones(3, 3, dtype=torch.bool).triu(1)[None]  # the first removes both
        >>> chain[0, 0, 2] = False  # now the second alone would remove the third, but falls itself
        >>> outlived(chain)
        tensor([[False,  True, False]])
    """
    fallen = torch.zeros_like(close[:, 0])
    for i in range(close.shape[1] - 1):
        fallen[:, i + 1 :] |= close[:, i, i + 1 :] & ~fallen[:, i : i + 1]
    return fallen


def in_order(matrix: Tensor, order: Tensor) -> Tensor:
    """``matrix [G, P, P]`` with rows and columns rearranged: place n is what was ``order[g, n]``."""
    P = order.shape[1]
    rows = matrix.gather(1, order[:, :, None].expand(-1, -1, P))
    return rows.gather(2, order[:, None, :].expand(-1, P, -1))


def unit_rows(features: Tensor) -> Tensor:
    """Unit vectors ``[..., D]`` float32; zeros for what has no direction: zero, NaN or infinite."""
    return torch.nn.functional.normalize(features.float(), dim=-1).nan_to_num(0.0, 0.0, 0.0)
