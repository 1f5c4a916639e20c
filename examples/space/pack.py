"""Puts into one folder what the Space needs: the page, this package as a wheel lays it out, the example model and its pictures."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PARTS = {
    "vlmprune": ROOT / "vlmprune",
    "vlmprune/triton_kernels": ROOT / "triton_kernels",
    "checkpoint": ROOT / "examples" / "glyphworld" / "checkpoint",
    "images": ROOT / "examples" / "glyphworld" / "images",
}
FILES = ("README.md", "app.py", "requirements.txt")


def main() -> None:
    """Write the folder, and say how large it is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="made anew; must not be there")
    folder = parser.parse_args().folder
    pack(folder)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {size / 2**20:.0f} MB")


def pack(folder: Path) -> None:
    """Copy everything. Raises FileExistsError where the folder is there already."""
    folder.mkdir(parents=True)
    for name in FILES:
        shutil.copy(HERE / name, folder)
    for name, source in PARTS.items():
        shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    shutil.copy(ROOT / "LICENSE", folder)


if __name__ == "__main__":
    main()
