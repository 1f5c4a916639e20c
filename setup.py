"""Build script: maps the top-level triton_kernels/ folder to vlmprune.triton_kernels; builds csrc/ when asked to."""

from __future__ import annotations

import os
import runpy
from pathlib import Path
from typing import Any

from setuptools import find_packages, setup


def packages() -> list[str]:
    """List vlmprune.* and the remapped vlmprune.triton_kernels.* packages."""
    main = find_packages(where=".", include=["vlmprune", "vlmprune.*"])
    kernels = find_packages(where=".", include=["triton_kernels", "triton_kernels.*"])
    return main + ["vlmprune." + name for name in kernels]


def native() -> dict[str, Any]:
    """Return the setup() arguments that build vlmprune/_C.abi3.so; none unless VLMPRUNE_BUILD_CUDA=1."""
    if os.environ.get("VLMPRUNE_BUILD_CUDA", "0") != "1":
        return {}
    recipe = runpy.run_path(str(Path(__file__).parent / "csrc" / "build.py"))
    return recipe["setup_arguments"]()


setup(
    **native(),
    packages=packages(),
    package_dir={"vlmprune": "vlmprune", "vlmprune.triton_kernels": "triton_kernels"},
    package_data={"vlmprune": ["py.typed"]},
    include_package_data=False,
    zip_safe=False,
)
