"""In which order a Python set of whole numbers gives them back, found on the device: some released code goes by it.

CPython's set is a table of slots, walked from the first to the last (Objects/setobject.c, the same since 3.7). A number k
goes to slot k modulo the table's size; where that is taken, to the first free one of the nine behind it, if the table has
as many; else on to slot ``5 i + 1 + (k >> 5 r)`` in round r. Filled to three fifths, the table grows to the first power of 2
above four times what it holds, and takes its numbers anew in the order of the old one.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from vlmprune.constants import whole_numbers

SMALLEST, RUN, SHIFT = 8, 10, 5
"""Slots of a new table; slots looked at from one place on; bits that a number loses with each further place."""
SHIFTS = 7
"""After so many a number below 2^35 has none left: then the places are all slots in turn."""


def set_order(numbers: Tensor) -> Tensor:
    """Which of ``numbers [B, P]`` comes at each place of ``list(set(numbers[b]))``: ``[B, P]`` int64; no host sync.

    Args:
        numbers: distinct whole numbers below 2^35, added one after the other; -1 = none, which come last.

    Example:
        >>> list({16, 3, 8, 1})
        [16, 1, 3, 8]
        >>> set_order(torch.tensor([[16, 3, 8, 1]]))
        tensor([[0, 3, 1, 2]])
    """
    there = numbers >= 0
    count, order = there.sum(1, keepdim=True), torch.argsort(~there, dim=1, stable=True)
    size, grown = SMALLEST, 0
    while grown <= numbers.shape[1]:
        full = -(-3 * (size - 1) // 5)  # so many, and the next table is due
        head = order[:, :full]
        walk = _slots(numbers.gather(1, head), size).argsort(dim=1, stable=True)
        order = torch.where(count >= grown, torch.cat([head.gather(1, walk), order[:, full:]], 1), order)
        size, grown = 1 << (4 * full).bit_length(), full
    return order


def _slots(numbers: Tensor, size: int) -> Tensor:
    """The slots ``[B, P]`` that numbers take one after the other in an empty table; ``size`` for a number of -1."""
    factors, sums = (whole_numbers(rows, numbers.device) for rows in _walk(size))
    bits = numbers.clamp(min=0)[..., None] >> whole_numbers(
        tuple(SHIFT * j for j in range(SHIFTS)), numbers.device
    )
    place = (
        ((bits % size)[..., None] * factors).sum(2).add_(sums).remainder_(size)[..., None]
    )  # [B, P, rounds, 1]
    run = torch.arange(RUN, device=numbers.device)
    tried = torch.where(place + RUN <= size, place + run, place).flatten(2)
    tried = torch.where(numbers[..., None] >= 0, tried, size)
    taken = torch.zeros(len(numbers), size + 1, dtype=torch.int64, device=numbers.device)
    slots = [taken[:, :0]]
    for candidates in tried.unbind(1):
        free = taken.gather(1, candidates).argmin(1, keepdim=True)  # the first of those that are
        slots.append(candidates.gather(1, free))
        taken.scatter_(1, slots[-1], 1)
    return torch.cat(slots, 1)


@cache
def _walk(size: int) -> tuple[tuple[tuple[int, ...], ...], tuple[int, ...]]:
    """Of each round's place, modulo the table's size: the factors ``[shifts, rounds]`` of a number's shifted bits, and the rest."""
    factors, sums = [[0] * SHIFTS], [0]
    factors[0][0] = 1
    for r in range(1, SHIFTS + size):
        factors.append([(5 * f + (j == r)) % size for j, f in enumerate(factors[-1])])
        sums.append((5 * sums[-1] + 1) % size)
    return tuple(zip(*factors, strict=True)), tuple(sums)
