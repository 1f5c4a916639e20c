"""Build script: maps the top-level triton_kernels/ folder to vlmprune.triton_kernels; builds csrc/ when asked to.

It also makes the description that package indexes show of the README, whose links lead to files that are not there.
"""

from __future__ import annotations

import os
import re
import runpy
import tomllib
from pathlib import Path
from typing import Any

from setuptools import find_packages, setup

HERE = Path(__file__).parent
CODE_OR_LINK = re.compile(
    r"```.*?```|`[^`]*`|(?P<picture>!?)\[(?P<words>(?:!\[[^\]]*\]\(\S*?\)|[^\[\]])*)\]\((?P<target>\S+?)\)",
    re.DOTALL,
)


def packages() -> list[str]:
    """List vlmprune.* and the remapped vlmprune.triton_kernels.* packages."""
    main = find_packages(where=".", include=["vlmprune", "vlmprune.*"])
    kernels = find_packages(where=".", include=["triton_kernels", "triton_kernels.*"])
    return main + ["vlmprune." + name for name in kernels]


def native() -> dict[str, Any]:
    """Return the setup() arguments that build vlmprune/_C.abi3.so; none unless VLMPRUNE_BUILD_CUDA=1."""
    if os.environ.get("VLMPRUNE_BUILD_CUDA", "0") != "1":
        return {}
    recipe = runpy.run_path(str(HERE / "csrc" / "build.py"))
    return recipe["setup_arguments"]()


def absolute(text: str, repository: str | None, version: str) -> str:
    """Return a Markdown text of the repository's root, its relative links leading to the release on GitHub.

    Without a ``repository`` their words stay, and pictures go.
    """

    def replace(match: re.Match[str]) -> str:
        target = match["target"]
        if target is None:  # code
            return match[0]
        words = absolute(match["words"], repository, version)
        if target.startswith(("https://", "http://")):
            return f"{match['picture']}[{words}]({target})"
        if repository is None:
            return "" if match["picture"] else words
        page = f"README.md{target}" if target.startswith("#") else target
        kind = "raw" if match["picture"] else "blob"
        return f"{match['picture']}[{words}]({repository}/{kind}/v{version}/{page})"

    return CODE_OR_LINK.sub(replace, text)


def description() -> str:
    """Return the README as package indexes show it. Where the repository is, [project.urls] says."""
    project = tomllib.loads((HERE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    repository = project.get("urls", {}).get("Repository")
    return absolute((HERE / "README.md").read_text(encoding="utf-8"), repository, project["version"])


if __name__ == "__main__":
    setup(
        **native(),
        long_description=description(),
        long_description_content_type="text/markdown",
        packages=packages(),
        package_dir={"vlmprune": "vlmprune", "vlmprune.triton_kernels": "triton_kernels"},
        package_data={"vlmprune": ["py.typed"]},
        include_package_data=False,
        zip_safe=False,
    )
