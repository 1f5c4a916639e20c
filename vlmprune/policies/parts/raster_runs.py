"""Runs of the raster: an image's tokens cut into stretches of equal length, and what each is worth (HoloV)."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from vlmprune.policies.base import Crop
from vlmprune.policies.groups import Counts, Groups, places_of

SCALE, SMALL = 1e3, 1e-6
"""What attention is multiplied by, and what is added to divisors, in the released code."""
DIGITS = 1 << 16
"""Of a run's score: what is beyond is rounding, which must not decide between runs of the same values."""


@lru_cache(64)
def runs_of(crops: Groups, counts: Counts) -> Groups:
    """Each image's tokens of its crops, in raster order, cut into ``counts[i]`` runs; the first ones may have one more.

    A run reaches from its first token to its last, over newlines between.
    """
    found, samples, images = [], [], []
    for image, (own, count) in enumerate(zip(crops.members, counts, strict=True)):
        places = sorted(place for group in own for place in places_of(crops.crops[group]))
        each, more = divmod(len(places), max(count, 1))
        for run in range(count):
            first = run * each + min(run, more)
            span = places[first + each - (run >= more)] - places[first] + 1
            found.append(Crop(places[first], span, 1, span))
        samples += [crops.owners[image]] * count
        images += [image] * count
    none = ((),) * len(counts)
    return replace(crops, crops=tuple(found), samples=tuple(samples), images=tuple(images), rest=none)


def run_scores(rows: Tensor, attention: Tensor, real: Tensor, diversity: float) -> Tensor:
    """Score of every run: its mean attention, and ``diversity`` times how its tokens' likeness to its others varies.

    Args:
        rows: ``[R, L, D]``.
        attention: ``[R, L]``, what each token receives.
        real: ``[R, L]`` bool, False at newlines and padding.
        diversity: weight of the variance of a token's cosines, whose mean is brought to that of the attention.

    Returns:
        ``[R]`` float64.
    """
    count = real.sum(1, keepdim=True).clamp(min=1)
    others = (count - 1).clamp(min=1)
    rows = rows.float().masked_fill(~real[..., None], 0.0)
    rows = rows / (rows.norm(dim=2, keepdim=True) + SMALL)
    alike = rows @ rows.mT
    alike.diagonal(dim1=1, dim2=2).zero_()
    apart = alike - (alike.sum(2) / others)[..., None]
    spread = apart.square().masked_fill(~real[:, None], 0.0).sum(2) / others
    # in float64 and then rounded, so that runs of the same values tie whatever their order
    attention, spread = (x.double().masked_fill(~real, 0.0).sum(1) / count[:, 0] for x in (attention, spread))
    paid = SCALE * attention
    whole, power = torch.frexp(paid + diversity * spread * (paid / (spread + SMALL)))
    return torch.ldexp((whole * DIGITS).round() / DIGITS, power)
