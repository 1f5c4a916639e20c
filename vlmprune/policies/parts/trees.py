"""Trees of tokens through a video's frames: each linked to one of the frame before, as many links as a budget allows."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlmprune.policies.parts.frames import over_runs
from vlmprune.policies.parts.peaks import in_proportion


def linked(x: Tensor, free: Tensor, runs: Tensor, left: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Links from tokens to the most alike ones of the frame before, in the same run of frames.

    Where links of a cosine above ``threshold`` would leave fewer roots in a run than shall stay, L links too many at most, only
    those stay that are above the L-th highest cosine.

    Args:
        x: ``[I, F, P, D]``.
        free: ``[I, F, P]`` bool, the tokens that may be linked, and linked to.
        runs: ``[I, F]``, as ``run_numbers`` gives them.
        left: ``[I, F]`` int64, how many tokens of each frame's free ones shall stay.

    Returns:
        ``parent [I, F, P]`` int64, the place ``f P + p`` of the one before, its own where there is none; ``link [I, F, P]`` bool.
    """
    _, F, P, _ = x.shape
    unit = normalize(x.float().nan_to_num(0.0, 0.0, 0.0), dim=-1)
    before = torch.cat([unit[:, :1], unit[:, :-1]], 1)
    to = torch.cat([torch.zeros_like(free[:, :1]), free[:, :-1]], 1)
    cosine = (unit @ before.mT).masked_fill(~to[:, :, None], -1.0)
    likeness, place = cosine.max(3)
    same = torch.cat([torch.zeros_like(runs[:, :1], dtype=torch.bool), runs[:, 1:] == runs[:, :-1]], 1)
    likeness = likeness.masked_fill(~(free & same[..., None]), -1.0)
    link = likeness > _highest(likeness, free, runs, left, threshold).clamp(min=-1.0 + 1e-6)
    own = torch.arange(F * P, device=x.device).view(F, P)
    return torch.where(link, own - own[0] - P + place, own), link


def _highest(likeness: Tensor, free: Tensor, runs: Tensor, left: Tensor, threshold: float) -> Tensor:
    """``[I, F, 1]`` the cosine that a link of each run must exceed."""
    P = likeness.shape[2]
    spare = over_runs(free.sum(2) - left, runs).long()  # L, by run
    above = over_runs((likeness > threshold).sum(2), runs).long()
    flat, of = likeness.flatten(1), runs[..., None].expand_as(likeness).flatten(1)
    order = flat.argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, of.gather(1, order).argsort(dim=1, stable=True))  # run by run, the highest first
    sizes = over_runs(torch.ones_like(runs), runs).long() * P
    absent = (runs < 0).sum(1, keepdim=True) * P  # frames that are not there come before all runs
    place = absent + sizes.cumsum(1) - sizes + spare - 1
    limit = flat.gather(1, order).gather(1, place.clamp(0, flat.shape[1] - 1))
    limit = torch.where(spare < 1, torch.inf, torch.where(above > spare, limit, threshold))
    return limit.gather(1, runs.clamp(min=0))[..., None]


def roots(parent: Tensor, link: Tensor) -> Tensor:
    """``[I, F P]`` int64 the place of the root of every token's tree."""
    root = parent.flatten(1)
    for _ in range((link.shape[1] - 1).bit_length()):  # each time twice as far
        root = root.gather(1, root)
    return root


def shares_of_runs(sizes: Tensor, left: Tensor, runs: Tensor) -> Tensor:
    """What all frames of a run have left, ``[I, F]`` int64 each, shared out over them in proportion to their ``sizes [I, F]``.

    A run that has fewer keeps them all.
    """
    F = runs.shape[1]
    of = (runs[:, None] == torch.arange(F, device=runs.device)[:, None]).long()  # [I, run, frame]
    sizes = of * sizes[:, None]
    total = torch.minimum((of * left[:, None]).sum(2), sizes.sum(2))
    return in_proportion(sizes, total).sum(1)
