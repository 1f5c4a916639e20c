"""How typical tokens are of their frame and of their video (VidCom2)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

WIDTHS = (0.125, 0.25, 0.5, 1.0, 2.0)
"""The variances of the Gaussians."""


def quiet_directions(x: Tensor, real: Tensor, share: float) -> Tensor:
    """``x [I, F, P, D]`` in that ``share`` of the channels that vary least over a video's tokens, of length 1: float32.

    Zeros where there is no token, ``real [I, F, P]`` False.
    """
    x, count = x.float(), max(1, int(x.shape[-1] * share))
    apart = (x - _mean(x, real, (1, 2))).masked_fill(~real[..., None], 0.0)
    quiet = apart.square().sum((1, 2)).argsort(dim=1, stable=True)[:, :count]
    return normalize(x.gather(3, quiet[:, None, None].expand(*x.shape[:3], -1)), dim=-1)


def typical(rows: Tensor, real: Tensor, dims: tuple[int, ...]) -> Tensor:
    """``[I, F, P]`` the sum of five Gaussians of the distance of each of ``rows [I, F, P, C]`` to their mean over these dims."""
    far = (rows - _mean(rows, real, dims)).square().sum(-1)
    return torch.stack([torch.exp(far / (-2 * width)) for width in WIDTHS]).sum(0)


def _mean(rows: Tensor, real: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Mean over these dims (kept) where there are tokens; elsewhere rows are zeros."""
    count = real.sum(dims, keepdim=True).clamp(min=1)
    return rows.sum(dims, keepdim=True) / count[..., None]
