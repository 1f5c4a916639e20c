"""Spectra that wait for nothing, against numpy's."""

import numpy as np
import pytest
import torch

from vlmprune.models.graphs.reads import HostReads
from vlmprune.policies.parts.spectrum import drawn, effective_rank, eigenvectors, principal_axes


def slow_rank(x):
    sigma = np.linalg.svd(x.double().cpu().numpy(), compute_uv=False)
    q = sigma[sigma > 0] / sigma.sum()
    return float(np.exp(-(q * np.log(q)).sum()))


def data(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(2, 1, 5), (2, 6, 3), (3, 16, 64), (1, 90, 40)])
@pytest.mark.parametrize("decay", [0, -3, -6])
@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e12])
def test_effective_rank(shape, decay, scale):
    x = data(*shape) * torch.logspace(0, decay, shape[2]) * scale
    expected = [slow_rank(sample) for sample in x]
    assert effective_rank(x).tolist() == pytest.approx(expected, rel=2e-5)


def test_effective_rank_of_few_directions():
    x = torch.eye(5)[[0, 0, 1, 1, 1]][None]
    two = effective_rank(x * torch.tensor([3.0**0.5, 2.0**0.5, 1, 1, 1]))
    assert float(two) == pytest.approx(2, rel=1e-4)
    assert float(effective_rank(torch.ones(1, 30, 4))) == pytest.approx(1, rel=1e-4)
    assert effective_rank(torch.zeros(2, 3, 4)).tolist() == [1, 1]
    broken = torch.stack([x[0], torch.full((5, 5), float("nan"))])
    assert effective_rank(broken)[0] == effective_rank(x)[0] and effective_rank(broken)[1] == 1


@pytest.mark.parametrize("q", [1, 2, 3, 8, 15, 40])
def test_eigenvectors(q):
    x = data(3, q + 2, q).double()
    x[2, :, 1:] = 0  # of rank 1
    S = x.mT @ x
    values, vectors = eigenvectors(S)
    one = torch.eye(q, dtype=S.dtype, device=S.device).expand(3, -1, -1)
    torch.testing.assert_close(vectors.mT @ vectors, one, atol=1e-12, rtol=0)
    torch.testing.assert_close(S @ vectors, vectors * values[:, None], atol=1e-8 * float(S.max()), rtol=0)
    for b in range(3):
        expected = np.linalg.eigvalsh(S[b].cpu().numpy())
        assert sorted(values[b].tolist()) == pytest.approx(expected.tolist(), abs=1e-8 * float(S.max()))


@pytest.mark.parametrize("shape", [(2, 30, 12), (2, 12, 30)])
def test_principal_axes(shape):
    """All of them are those of the whole matrix, by falling singular value; beyond its rank they are zeros."""
    x = data(*shape) * torch.linspace(1, 3, shape[2])
    x[1] = x[1, :, :1] @ x[1, :1]
    got = principal_axes(x, 12, seed=4)
    right = np.linalg.svd(x[0].double().cpu().numpy(), full_matrices=False)[2].T
    cosines = np.abs((got[0].cpu().numpy() * right).sum(0))
    assert cosines.tolist() == pytest.approx([1] * 12, abs=1e-6)
    assert not got[1, :, 1:].any() and float(got[1, :, 0].norm()) == pytest.approx(1)


def test_drawn():
    assert torch.equal(drawn(3, 4, 5, torch.device("cpu")), data(4, 5, seed=3).cpu())


def test_nothing_is_read():
    x = data(2, 9, 5)
    principal_axes(x, 4, 0)  # constants are made once
    effective_rank(x)
    with HostReads(x.device):
        principal_axes(x, 4, 0)
        effective_rank(x)
