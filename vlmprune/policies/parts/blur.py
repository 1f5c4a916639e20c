"""Scores of some tokens spread over the grids of their images by a Gaussian: what they say of the tokens around them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vlmprune.constants import remembered
from vlmprune.errors import check
from vlmprune.policies.base import Grid
from vlmprune.policies.checks import is_number

Grids = tuple[tuple[Grid, ...], ...]

SPREADS = 0.25, 1000.0
"""Narrower a Gaussian is 0 in float32 within a few tokens, wider it is the same for all of them."""


def check_spread(spread: object) -> None:
    """``spread`` is the standard deviation of a Gaussian that float32 can tell from none, and from a constant."""
    ok = is_number(spread) and SPREADS[0] <= spread <= SPREADS[1]
    check(ok, "spread", "a number from {:g} to {:g}".format(*SPREADS), repr(spread))


def blurred(scores: Tensor, ordinals: Tensor, grids: Grids, spread: float, tokens: int) -> Tensor:
    """float32 ``[B, tokens]``: for every token of every grid the sum of ``scores[b, j] exp(-d^2 / (2 spread^2))``.

    d is the distance in rows and columns to token j; tokens of other grids, which may show anything, say nothing.

    Args:
        scores: ``[B, c]``.
        ordinals: ``[B, c]`` int64 which tokens they are of, -1 = padding.
        grids: per sample, those of its tokens.
        spread: standard deviation, in rows and columns.
        tokens: width of the result, those of the fullest sample.
    """
    size = _canvas(grids)
    cells = _cells(grids, size, scores.device)  # [B, tokens]
    spare = size[0] * size[1] * size[2]
    at = torch.where(ordinals >= 0, cells.gather(1, ordinals.clamp(min=0)), spare)
    flat = scores.new_zeros(len(scores), spare + 1, dtype=torch.float32).scatter_(1, at, scores.float())
    canvas = flat[:, :spare].view(-1, *size)
    down, across = (_gaussian(n, spread, scores.device) for n in size[1:])
    return (down @ canvas @ across).flatten(1).gather(1, cells.clamp(max=spare - 1))[:, :tokens]


def _canvas(grids: Grids) -> tuple[int, int, int]:
    """Grids of a sample, rows and columns, at most; one of each at least."""
    some: Sequence[Grid] = [grid for own in grids for grid in own]
    most = max((len(own) for own in grids), default=0)
    return max(1, most), max([1, *(r for r, _ in some)]), max([1, *(c for _, c in some)])


@remembered()
def _cells(grids: Grids, size: tuple[int, int, int], device: torch.device) -> Tensor:
    """``[B, N]`` int64 the cell of each token among the grids, laid out as large as the largest; the one behind = padding."""
    _, rows, columns = size
    found = []
    for own in grids:
        cells = [torch.zeros(0, dtype=torch.int64)]
        for number, (r, c) in enumerate(own):
            order = torch.arange(r * c)
            cells.append((number * rows + order // max(c, 1)) * columns + order % max(c, 1))
        found.append(torch.cat(cells))
    spare = size[0] * rows * columns
    one_more = [*found, torch.zeros(1, dtype=torch.int64)]  # neither the batch nor a row of it may be empty
    return pad_sequence(one_more, batch_first=True, padding_value=spare)[:-1].to(device)


@remembered()
def _gaussian(n: int, spread: float, device: torch.device) -> Tensor:
    """``[n, n]`` float32."""
    order = torch.arange(n, dtype=torch.float64)
    far = (order[:, None] - order) ** 2
    return torch.exp(-far / (2 * spread**2)).float().to(device)
