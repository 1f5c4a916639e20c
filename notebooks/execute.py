"""Runs the notebooks and writes their outputs into them: `make notebooks`.

    python notebooks/execute.py [NAME.ipynb ...]

Each runs from nothing in this folder. Without times and versions among what is stored, a notebook changes only where its cells
or their outputs do.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent


def execute(path: Path, timeout: float = 600) -> nbformat.NotebookNode:
    """The notebook with what its cells give, each within ``timeout`` seconds; the file stays as it is.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised.
        nbclient.exceptions.CellTimeoutError: a cell took longer.
    """
    notebook = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": str(path.parent)}}
    # Without ipywidgets tqdm warns, with the path of its own file.
    env = {**os.environ, "PYTHONWARNINGS": "ignore:IProgress not found"}
    NotebookClient(notebook, timeout=timeout, resources=where, record_timing=False).execute(env=env)
    notebook.metadata.language_info = {"name": "python"}
    return notebook


def main() -> None:
    """Run the notebooks that are named, or all."""
    paths = [FOLDER / name for name in sys.argv[1:]] or sorted(FOLDER.glob("*.ipynb"))
    for path in paths:
        done = execute(path)
        nbformat.validate(done)
        nbformat.write(done, path)
        print(f"{path.name}: {path.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main()
