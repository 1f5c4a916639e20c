"""The tokens left of, right of, above and below others on their crop's grid."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmprune.constants import whole_numbers
from vlmprune.policies.groups import Groups


def with_neighbours(crops: Groups, marked: Tensor) -> Tensor:
    """``[I, T]`` bool, the tokens of every crop that are ``marked [I, T]``, and those left, right, above and below them."""
    last, device = marked.shape[1] - 1, marked.device
    columns = whole_numbers(tuple(crop.columns for crop in crops.crops), device)[:, None]
    place = torch.arange(last + 1, device=device).expand_as(marked)
    column = place % columns
    found = marked
    for beside, inside in (
        (place - 1, column > 0),
        (place + 1, column < columns - 1),
        (place - columns, place >= columns),
        (place + columns, place + columns <= last),
    ):
        found = found | (marked.gather(1, beside.clamp(0, last)) & inside)
    return found
