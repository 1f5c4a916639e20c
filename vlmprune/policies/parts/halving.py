"""Tokens that go, one after another halfway into the kept token most like them (HoliTom's merging inside the model)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlmprune import ops
from vlmprune.policies.choose import marks


def halved(x: Tensor, index: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Each token that goes, in order, makes the kept one of highest cosine ``(row + its own) / 2``.

    After m mergers a row holds itself times 2^-m, and the token that came i-th of m times 2^-(m - i + 1).

    Args:
        x: ``[B, N, D]``.
        index: ``[B, K]`` the tokens that stay, ascending, -1 on the right.
        mask: ``[B, N]`` bool, False = padding.

    Returns:
        Rows ``[B, K, D]`` of the tokens that stay, and into which token each was merged ``[B, N]``, -1 = into none.
    """
    unit = normalize(x.float(), dim=-1)
    cosine = (unit @ ops.gather_tokens([unit], index)[0].mT).nan_to_num(-1.0)
    target = cosine.masked_fill((index < 0)[:, None], -2.0).argmax(2)
    stays = marks(index, x.shape[1])
    goes = mask & ~stays
    taken = (target[..., None] == torch.arange(index.shape[1], device=x.device)) & goes[..., None]
    upto = taken.cumsum(1, dtype=torch.int32)
    met = upto[:, -1]  # [B, K], how many each slot takes
    behind = (met[:, None] - upto).gather(2, target[..., None])[..., 0]
    own = torch.where(stays, stays.long().cumsum(1) - 1, 0)
    weight = torch.exp2(-torch.where(stays, met.gather(1, own), behind + 1).float())
    slot = torch.where(stays, own, target).masked_fill(~mask, -1)
    made = ops.merge_tokens(x.contiguous(), slot, index.shape[1], mode="sum", weights=weight)
    return made, index.gather(1, target).masked_fill(~goes, -1)
