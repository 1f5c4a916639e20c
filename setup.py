"""Build script: maps the top-level triton_kernels/ folder to the package vlmprune.triton_kernels."""

from __future__ import annotations

from setuptools import find_packages, setup


def packages() -> list[str]:
    """List vlmprune.* and the remapped vlmprune.triton_kernels.* packages."""
    main = find_packages(where=".", include=["vlmprune", "vlmprune.*"])
    kernels = find_packages(where=".", include=["triton_kernels", "triton_kernels.*"])
    return main + ["vlmprune." + name for name in kernels]


setup(
    packages=packages(),
    package_dir={"vlmprune": "vlmprune", "vlmprune.triton_kernels": "triton_kernels"},
    package_data={"vlmprune": ["py.typed"]},
    include_package_data=False,
    zip_safe=False,
)
