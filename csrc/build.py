"""Build ``vlmprune/_C.abi3.so``: one nvcc call over ``csrc/*.cu`` with the headers of the installed PyTorch.

``setup.py`` runs this file when VLMPRUNE_BUILD_CUDA=1. The library holds no Python code and uses only PyTorch's
stable ABI, so one build serves every Python and every PyTorch from 2.10 on, and it loads on a CPU-only PyTorch.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from pathlib import Path
from typing import Any

from setuptools import Extension
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
SOURCES = sorted(path.name for path in HERE.glob("*.cu"))
ARCHITECTURES = ("80", "90a", "100a")  # 8.x, H100 and H200, B200; an "a" runs on that one architecture alone
PTX = "80"  # for every other GPU from 8.0 on, compiled by the driver at first use
TORCH_TARGET = "0x020a000000000000"  # PyTorch 2.10: all that are supported have this ABI


def nvcc() -> str:
    """Return the path of nvcc, or raise RuntimeError."""
    path = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if path is None:
        raise RuntimeError("nvcc: expected CUDA 12.8 or newer on PATH or in /usr/local/cuda, got none")
    return path


def torch_folder() -> Path:
    """Return the folder of the installed PyTorch, without importing it, or raise RuntimeError."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise RuntimeError(
            "torch: expected an installed PyTorch, got none (pip install needs --no-build-isolation)"
        )
    return Path(spec.origin).parent


def command(output: Path) -> list[str]:
    """Return the nvcc call, to be run in this folder, that writes ``output``."""
    torch = torch_folder()
    code = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    code += [f"-gencode=arch=compute_{PTX},code=compute_{PTX}"]
    compile_ = ["-std=c++20", "-O3", "--threads=0", "-Xcompiler=-fPIC,-fvisibility=hidden", *code]
    headers = ["-Iinclude", "-isystem", str(torch / "include"), f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
    # libtorch must be a direct dependency, used or not: through it the loader finds the CUDA stream symbol.
    link = ["-cudart=static", f"-L{torch / 'lib'}", "-Xlinker=--no-as-needed", "-ltorch", "-ltorch_cpu"]
    return [nvcc(), "-shared", *compile_, *headers, *SOURCES, "-o", str(output.resolve()), *link]


class BuildCuda(build_ext):
    """Replaces setuptools' compile and link steps by the nvcc call."""

    def build_extension(self, ext: Extension) -> None:
        """Write the library where setuptools expects it."""
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(command(output), cwd=HERE, check=True)


def setup_arguments() -> dict[str, Any]:
    """Return what setup() needs to build the extension and to tag the wheel for the stable Python ABI."""
    library = Extension("vlmprune._C", [f"csrc/{name}" for name in SOURCES], py_limited_api=True)
    return {
        "ext_modules": [library],
        "cmdclass": {"build_ext": BuildCuda},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }
