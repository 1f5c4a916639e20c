"""Select inputs that break a careless kernel, shared by the emulated and the GPU test."""

import torch


def _scores(N: int, g: torch.Generator) -> list[torch.Tensor]:
    """One row a kind of trouble: ties, zeros of both signs, NaN, infinities, denormals, constants."""
    x = torch.randn(N, generator=g)
    special = torch.tensor([float("nan"), -float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1.0, -1.0])
    pick = torch.randint(len(special), (N,), generator=g)
    return [
        x,
        torch.exp(-20 * torch.rand(N, generator=g)),
        (2 * x).round(),
        torch.where(pick < 6, special[4 + pick % 2], x),
        special[pick],
        torch.where(pick < 4, special[pick], x),
        pick * 1e-44 * x.sign(),
        torch.full((N,), 0.25),
        torch.full((N,), float("nan")),
    ]


def make_case(N: int, coded: bool, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Scores ``[B, N]`` with a wide row stride, keep ``[B]``, code or None."""
    g = torch.Generator().manual_seed(seed)
    rows = _scores(N, g)
    scores = torch.full((len(rows), N + 3), float("inf"))[:, :N]
    scores.copy_(torch.stack(rows))
    quotas = torch.tensor([N // 9 + 1, N // 2, 0, 1, N, N - 1, N + 7, -3])
    keep = quotas[(torch.arange(len(rows)) + seed) % len(quotas)]
    if not coded:
        return scores, keep, None
    code = torch.randint(3, (len(rows), N + 5), generator=g, dtype=torch.int8)[:, :N]
    code[seed % len(rows)] = 1 + seed % 2
    return scores, keep, code


def uneven(N: int) -> torch.Tensor:
    """Scores ``[7, N]`` of which a level says little about the next: outliers far from a cluster, clusters, every power of two."""
    g = torch.Generator().manual_seed(N)
    noise, few = torch.rand(N, generator=g) * 1e-5, torch.arange(N) < 3
    rows = [
        torch.where(few, 1e-30, 1 + noise),
        torch.where(few, -1e30, 1 + noise),
        torch.where(few, 1e30, noise),
        torch.where(torch.arange(N) < N // 2, noise, 100 + noise),
        2.0 ** torch.linspace(-140, 120, N),
        -(2.0 ** torch.linspace(-140, 120, N)),
        torch.randn(N, generator=g).bfloat16().float(),
    ]
    return torch.stack([row[torch.randperm(N, generator=g)] for row in rows])
