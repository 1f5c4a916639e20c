"""Trees of tokens through a video's frames: each linked to one of the frame before, as many links as a budget allows."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlmprune import ops
from vlmprune.policies.parts.frames import over_runs
from vlmprune.policies.parts.peaks import NEAR, density_peaks, in_proportion, means_of


def clustered_trees(
    x: Tensor, free: Tensor, runs: Tensor, left: Tensor, threshold: float, divide: str
) -> tuple[Tensor, Tensor, Tensor]:
    """What is left of tokens when trees of links become one row at their root, and clusters of a frame's roots one at their peak.

    Args:
        x, free, runs, left, threshold: as in ``linked``. What a run's frames have left they share in proportion to their roots.
        divide: a tree's sum by its ``"tokens"``, or by one more than its root's own ``"links"``.

    Returns:
        Which stay, ``[I, F, P]`` bool; their rows, ``[I, F, P, D]`` float32; and the place ``f P + p`` in its video of what each
        token has become a part of, ``[I, F, P]`` int64, -1 = of nothing.
    """
    parent, link = linked(x, free, runs, left, threshold)
    root, heads = roots(parent, link), free & ~link
    rows = _grown(x, parent, link, root, divide)
    wanted = shares_of_runs(heads.sum(2), left, runs)
    joined = density_peaks(rows, heads, wanted, wanted.clamp(max=NEAR), NEAR)
    places = torch.arange(x.shape[2], device=x.device)
    at = joined + torch.arange(x.shape[1], device=x.device)[:, None] * len(places)
    into = torch.where(joined < 0, -1, at).flatten(1).gather(1, root).view(free.shape)
    return joined == places, means_of(rows, joined), into


def _grown(x: Tensor, parent: Tensor, link: Tensor, root: Tensor, divide: str) -> Tensor:
    """``[I, F, P, D]`` float32, every tree's row at its root."""
    rows, tokens = x.float().flatten(1, 2), root.shape[1]
    if divide == "tokens":
        return ops.merge_tokens(rows, root, tokens).view(x.shape)
    total = ops.merge_tokens(rows, root, tokens, mode="sum")
    links = torch.zeros_like(root).scatter_add(1, parent.flatten(1), link.flatten(1).long())
    return (total / (1 + links)[..., None]).view(x.shape)


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
    same = torch.cat([torch.zeros_like(free[:, :1, 0]), runs[:, 1:] == runs[:, :-1]], 1)
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
    place = sizes.cumsum(1) - sizes + spare - 1
    limit = flat.gather(1, order).gather(1, place.clamp(0, flat.shape[1] - 1))
    limit = torch.where(spare < 1, torch.inf, torch.where(above > spare, limit, threshold))
    return limit.gather(1, runs)[..., None]


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
