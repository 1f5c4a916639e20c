"""The options that every study has, and where its rows go."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from common.rows import Row, save


def options(text: str | None, dtype: str = "bfloat16") -> argparse.ArgumentParser:
    """A study's command line with what all have; ``text`` is its module's docstring, ``dtype`` the default."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--name", help="what the rows call the model and its world (default: the name of its folder)")
    add("--csv", type=Path, help="a table to bring up to date: its rows of the same arms are replaced")
    add("--batch-size", type=int, default=32)
    add("--dtype", choices=("float32", "bfloat16"), default=dtype)
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    return parser


def name_of(chosen: argparse.Namespace) -> str:
    """What the rows call the model."""
    return chosen.name or Path(chosen.model).resolve().name


def save_rows(chosen: argparse.Namespace, rows: Sequence[Row], dtype: str) -> None:
    """Write ``rows.csv`` of the study's folder, and bring the shared table up to date."""
    for path in (chosen.out / "rows.csv", *([chosen.csv] if chosen.csv else [])):
        save(path, rows, dtype)
