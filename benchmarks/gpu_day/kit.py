"""What `make gpu-day` makes beforehand for a machine without network, and how that is put to use there.

The folder has the CUDA extension, compiled Triton kernels, and packages in pure Python; each may be missing.
"""

from __future__ import annotations

import hashlib
import json
import runpy
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIBRARY, DIGEST = "_C.abi3.so", "_C.digest"
KERNELS, INDEX = "kernels", "index.json"
STAMP = "commit.json"
MEASURED = ("vlmprune", "triton_kernels", "csrc", "benchmarks")  # what a number is a number of
SOURCES = (".py", ".cu", ".cuh", ".h")


def sources_digest(*folders: str) -> str:
    """Of all that the CUDA extension is built from, or of these folders: a library of other sources is no use."""
    digest = hashlib.sha256()
    paths = (path for folder in folders or ("csrc",) for path in (ROOT / folder).rglob("*"))
    for path in sorted(path for path in paths if path.suffix in SOURCES):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def stamp(folder: Path) -> None:
    """Note the commit of what is measured, for a machine that is given no history; "-dirty" if it is not all committed."""
    git = ("git", "-C", str(ROOT))
    told = [(*git, "rev-parse", "--short", "HEAD"), (*git, "status", "--porcelain", "--", *MEASURED)]
    commit, changed = (subprocess.run(c, check=True, capture_output=True, text=True).stdout for c in told)
    noted = {"commit": commit.strip() + ("-dirty" if changed else ""), "sources": sources_digest(*MEASURED)}
    (folder / STAMP).write_text(json.dumps(noted))


def commit(folder: Path) -> str:
    """Of the checkout; where it came without history the one that was noted, marked if the sources are others by now."""
    git = ("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*")
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        if not (folder / STAMP).exists():
            return "unknown"
    noted = json.loads((folder / STAMP).read_text())
    return noted["commit"] if noted["sources"] == sources_digest(*MEASURED) else f"{noted['commit']}-changed"


def has_library(folder: Path) -> bool:
    """Whether the extension of these sources lies there."""
    library, digest = folder / LIBRARY, folder / DIGEST
    return library.exists() and digest.exists() and digest.read_text() == sources_digest()


def build_library(folder: Path) -> None:
    """The extension, with the PyTorch that is here."""
    command = runpy.run_path(str(ROOT / "csrc" / "build.py"))["command"](folder / LIBRARY)
    subprocess.run(command, cwd=ROOT / "csrc", check=True)
    (folder / DIGEST).write_text(sources_digest())


def copy_library(source: Path, target: Path) -> None:
    """Library and digest."""
    for name in (LIBRARY, DIGEST):
        shutil.copy2(source / name, target / name)


def lay_out_package(state: Path, kit: Path) -> Path:
    """The package as a wheel would lay it out, with the extension if there is one: triton_kernels/ becomes vlmprune.triton_kernels."""
    site, fresh = state / "site", state / "site.new"
    shutil.rmtree(fresh, ignore_errors=True)
    leave_out = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(ROOT / "vlmprune", fresh / "vlmprune", ignore=leave_out)
    shutil.copytree(ROOT / "triton_kernels", fresh / "vlmprune" / "triton_kernels", ignore=leave_out)
    there = next((folder for folder in (site / "vlmprune", kit) if has_library(folder)), None)
    if there is not None:
        copy_library(there, fresh / "vlmprune")
    shutil.rmtree(site, ignore_errors=True)
    fresh.rename(site)
    return site


def cache_name(key: str) -> str:
    """What Triton's cache calls a kernel."""
    return hashlib.sha256(key.encode()).hexdigest()


class KernelStore:
    """Compiled kernels, filed by that part of Triton's key which does not depend on how Triton itself was built.

    Triton's key begins with a digest of its own files, and those differ from Python to Python; the compiler is the same.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._index = folder, folder / INDEX

    def write(self, kernels: dict[str, dict[str, bytes]]) -> None:
        """Replace the store: rest of the key -> files of a kernel by name."""
        import triton

        shutil.rmtree(self._folder, ignore_errors=True)
        names = {}
        for rest, files in kernels.items():
            names[rest] = cache_name(rest)[:32]
            (self._folder / names[rest]).mkdir(parents=True)
            for name, data in files.items():
                (self._folder / names[rest] / name).write_bytes(data)
        self._index.write_text(json.dumps({"triton": triton.__version__, "kernels": names}))

    def lay_out(self) -> str:
        """Put the kernels into Triton's cache, under the keys of the Triton that is here; a line about it."""
        import triton
        from triton.runtime.cache import get_cache_manager, triton_key

        if not self._index.exists():
            return "no kernels were compiled beforehand: each is when it is first met"
        index = json.loads(self._index.read_text())
        if index["triton"] != triton.__version__:
            return f"kernels were compiled with Triton {index['triton']}, here is {triton.__version__}: they are compiled again"
        for rest, name in index["kernels"].items():
            cache = get_cache_manager(cache_name(f"{triton_key()}-{rest}"))
            files = [*(self._folder / name).iterdir()]
            group = {path.name: cache.put(path.read_bytes(), path.name) for path in files}
            (metadata,) = [path.name for path in files if path.suffix == ".json"]
            cache.put_group(metadata, group)
        return f"{len(index['kernels'])} kernels were compiled beforehand, with Triton {index['triton']}"
