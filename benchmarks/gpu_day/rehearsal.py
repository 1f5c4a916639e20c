"""How a dry run starts a stage: as a fork of a process that has imported what takes seconds, so that all of them take few."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Mapping, Sequence
from multiprocessing import get_context
from typing import TextIO


def prepare(env: Mapping[str, str]) -> None:
    """Give this process the variables of a stage, and import what every stage imports."""
    os.environ.update(env)
    sys.path[:0] = env["PYTHONPATH"].split(os.pathsep)
    import micro.sweep  # noqa: F401
    import torch._dynamo  # noqa: F401, which the first call of an op imports
    import transformers.modeling_utils  # noqa: F401
    import triton  # noqa: F401


def start(line: Sequence[str], log: TextIO) -> int:
    """Exit code of ``python *line``."""
    process = get_context("fork").Process(target=_run, args=(line, log))
    process.start()
    process.join()
    return process.exitcode or 0


def _run(line: Sequence[str], log: TextIO) -> None:
    for stream in (1, 2):
        os.dup2(log.fileno(), stream)
    module = line[0] == "-m"
    sys.argv = [*line[1:]] if module else [*line]
    if module:
        runpy.run_module(line[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(line[0], run_name="__main__")
