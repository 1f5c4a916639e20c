"""The ops that move rows, with their kernels run in the emulator."""

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
