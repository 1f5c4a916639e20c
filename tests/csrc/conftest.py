"""Select inputs that break a careless kernel, shared by the emulated and the GPU test; the emulated ops that move rows."""

import ctypes
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

CSRC = Path(__file__).parents[2] / "csrc"


class TensorRows:
    """gather_tokens and compact_kv with their Torch-facing launchers, on CPU tensors, each kernel run in the emulator."""

    def __init__(self, library):
        torch.ops.load_library(library)
        self.entries, self.ops = ctypes.CDLL(library), torch.ops._vlmprune_emulated

    def run(self, op, tensors, index, *, seed=0, skipped_barrier=0):
        """(what the op returns, how many launches it took)."""
        self.entries.configure(seed, skipped_barrier)
        return getattr(self.ops, op)(tensors, index), self.entries.launches()


@pytest.fixture(scope="session")
def tensor_rows(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    emulator, torch_folder = Path(__file__).parent / "emulator", Path(torch.__file__).parent
    library = tmp_path_factory.mktemp("emulator") / "tensor_rows.so"
    target = runpy.run_path(str(CSRC / "build.py"))["TORCH_TARGET"]
    command = ["g++", "-std=c++20", "-O2", "-shared", "-fPIC", f"-DTORCH_TARGET_VERSION={target}"]
    command += [f"-I{emulator}", f"-I{CSRC}/include", f"-I{CSRC}", "-isystem", torch_folder / "include"]
    command += [
        emulator / "tensor_rows.cpp",
        "-o",
        library,
        f"-L{torch_folder}/lib",
        "-ltorch",
        "-ltorch_cpu",
    ]
    subprocess.run(command, check=True)
    return TensorRows(str(library))


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


@pytest.fixture
def make_case():
    """Return a function (N, coded, seed) -> scores ``[B, N]`` with a wide row stride, keep ``[B]``, code or None."""

    def make(N: int, coded: bool, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
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

    return make
