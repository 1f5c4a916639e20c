"""Spectra without waiting for the device, which PyTorch's own eigenvalues do: effective rank, principal axes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vlmprune.constants import counting, remembered, whole_numbers

STEP = 1.5
"""Of the trapezoidal rule over log t: the error of a square root is 4e-6."""

FIRST, NODES = -28.5, 26
"""The rule's first log t, where rounding begins to matter, and how many of its nodes are computed; beyond is known."""

SWEEPS = 8
"""Of Jacobi rotations: 8 leave an error of 1e-9 of the largest value for 48 rows, of 3e-5 for 333."""


def effective_rank(rows: Tensor) -> Tensor:
    """exp of the entropy of the singular values' shares in their sum: ``[G, P, D]`` to ``[G]`` float64, 1 for all zeros.

    With the eigenvalues λ of the Gram matrix, scaled to sum 1, it takes the traces of √λ and of √λ log λ. Both are integrals
    over log t of λ / (λ + t), weighted by √t and by √t log t, so that inverses are all it needs. NaN and infinities are zeros.
    """
    x = rows.double().nan_to_num(0.0, 0.0, 0.0)
    x = x / x.abs().amax((1, 2), keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    gram = x @ x.mT if x.shape[1] <= x.shape[2] else x.mT @ x
    trace = gram.diagonal(dim1=1, dim2=2).sum(1)
    gram = gram / trace.clamp(min=torch.finfo(torch.float64).tiny)[:, None, None]
    one, size = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device), gram.shape[1]
    roots, logs = (torch.full_like(trace, end) for end in _ends(above=True))
    for node in range(NODES):
        t = math.exp(FIRST + node * STEP)
        lower = torch.linalg.cholesky_ex(gram + t * one).L
        part = size - t * torch.linalg.solve_triangular(lower, one, upper=False).square().sum((1, 2))
        root, log = _weights(node)
        if node == 0:  # below, all that is left is as good as there
            root, log = (a + b for a, b in zip((root, log), _ends(above=False), strict=True))
        roots, logs = roots + root * part, logs + log * part
    entropy = roots.log() - logs / (2 * roots)
    return torch.where(trace > 0, entropy.exp(), 1.0)


def _weights(node: int) -> tuple[float, float]:
    """How much λ / (λ + t) at a node adds to √λ and to √λ log λ."""
    log = FIRST + node * STEP
    root = STEP / math.pi * math.exp(log / 2)
    return root, root * log


def _ends(above: bool) -> tuple[float, float]:
    """The sum of the weights of 60 nodes beyond: ``above``, where λ / (λ + t) is λ / t, times 1 / t."""
    nodes = range(NODES, NODES + 60) if above else range(-60, 0)
    scale = [math.exp(-(FIRST + node * STEP)) if above else 1.0 for node in nodes]
    both = [_weights(node) for node in nodes]
    return (
        sum(w[0] * s for w, s in zip(both, scale, strict=True)),
        sum(w[1] * s for w, s in zip(both, scale, strict=True)),
    )


def principal_axes(data: Tensor, axes: int, seed: int, rounds: int = 2) -> Tensor:
    """Right singular vectors ``[G, P, axes]`` float64 of ``data [G, M, P]``, from a random subspace (Halko et al. 2011).

    What ``torch.svd_lowrank`` does, with the random numbers of a seed, and the same on every device: by falling singular
    value, of signs that mean nothing. An axis beyond the rank is zeros.

    Args:
        data: its columns are expected to be centered, for principal components.
        axes: how many, at most min(M, P).
        seed: of the subspace.
        rounds: of power iteration.
    """
    wide = data.shape[1] < data.shape[2]
    A = data.double().mT if wide else data.double()
    basis = torch.linalg.qr(A @ drawn(seed, A.shape[2], axes, A.device).double()).Q
    for _ in range(rounds):
        basis = torch.linalg.qr(A.mT @ basis).Q
        basis = torch.linalg.qr(A @ basis).Q
    within = basis.mT @ A
    values, vectors = eigenvectors(within @ within.mT)
    values, falling = values.sort(dim=1, descending=True, stable=True)
    vectors, length = vectors.gather(2, falling[:, None].expand_as(vectors)), values.clamp(min=0).sqrt()
    real = length > 1e-7 * length[:, :1]
    if wide:
        return basis @ vectors * real[:, None]
    return within.mT @ vectors * torch.where(real, 1 / length, 0.0)[:, None]


def main_axis(rows: Tensor, axes: int, seed: int) -> Tensor:
    """Which principal axis each of ``rows [G, P, D]`` is most of, ``[G, P]`` int64: where its entry is of largest magnitude.

    An axis has an entry for every row: the D features are observations, of which each row, minus its mean, is a variable.
    """
    data = rows.mT - rows.mT.mean(1, keepdim=True)
    return principal_axes(data, min(axes, *data.shape[1:]), seed).abs().argmax(-1)


@remembered()
def drawn(seed: int, rows: int, columns: int, device: torch.device) -> Tensor:
    """Normal random numbers ``[rows, columns]`` float32, the same on every device."""
    # On the CPU whatever the device: generators of different devices draw different numbers.
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(device)


def eigenvectors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues ``[G, q]`` and eigenvectors ``[G, q, q]``, in columns, of symmetric float64 matrices, in no order.

    By Jacobi rotations of all pairs, q / 2 at a time: rows 0 and 1, 2 and 3, ... are a pair, then all but one move on.
    """
    G, q, device = len(matrix), matrix.shape[1], matrix.device
    if q % 2:  # a row of zeros, which is rotated by nothing
        matrix = torch.nn.functional.pad(matrix, (0, 1, 0, 1))
    size = matrix.shape[1]
    S, V = matrix, torch.eye(size, dtype=matrix.dtype, device=device).expand(G, -1, -1)
    even, odd = (counting(1, size // 2, device)[0] * 2 + i for i in (0, 1))
    moves = whole_numbers(_moved(size), device)
    for _ in range(SWEEPS * (size - 1)):
        turn = _rotations(S[:, even, even], S[:, odd, odd], S[:, even, odd])
        both = _turned(turn, torch.cat([S, V], 2))
        S, V = _turned(turn, both[:, :, :size].mT), both[:, :, size:]
        S, V = S.index_select(1, moves).index_select(2, moves), V.index_select(1, moves)
    values, vectors = S.diagonal(dim1=1, dim2=2), V.mT
    if q < size:  # a pair with it is never turned, so one row is its own
        own = V[:, :, q].abs().argsort(dim=1, stable=True)[:, :q]
        return values.gather(1, own), vectors[:, :q].gather(2, own[:, None].expand(-1, q, -1))
    return values, vectors


def _moved(size: int) -> tuple[int, ...]:
    """Which row each place gets next, of a round robin: the first stays, all others go around a table of two rows."""
    top, bottom = [*range(0, size, 2)], [*range(1, size, 2)]
    if size > 2:
        top, bottom = [top[0], bottom[0], *top[1:-1]], [*bottom[1:], top[-1]]
    return tuple(row for pair in zip(top, bottom, strict=True) for row in pair)


def _rotations(first: Tensor, second: Tensor, mixed: Tensor) -> Tensor:
    """Of every pair ``[G, h]`` the rotation ``[G h, 2, 2]`` that makes its two rows orthogonal."""
    apart = (second - first) / (2 * torch.where(mixed == 0, 1.0, mixed))
    tangent = torch.where(apart < 0, -1.0, 1.0) / (apart.abs() + (1 + apart * apart).sqrt())
    tangent = torch.where(mixed == 0, 0.0, tangent)
    c = (1 + tangent * tangent).rsqrt()
    s = tangent * c
    return torch.stack([c, -s, s, c], -1).view(-1, 2, 2)


def _turned(rotations: Tensor, rows: Tensor) -> Tensor:
    """Every pair of neighbouring rows ``[G, q, m]``, rotated."""
    return (rotations @ rows.reshape(-1, 2, rows.shape[2])).view(rows.shape)
