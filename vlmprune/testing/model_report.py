"""What ``check_model`` found, as rows for people and for programs."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from math import isfinite
from typing import Any

from vlmprune import __version__

HEADS = ("", "", "compared", "difference", "same tokens", "")
"""What stands in the columns of a printed report; the others are the verdict, the batch and what is wrong."""


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        batch: "prompt" (of one) or "batch" (padded), unless the samples were given.
        compared: which run with which other.
        difference: the largest between their logits, over samples, steps and the vocabulary.
        allowed: how large it may be; None = it is measured here.
        same: of how many tokens both would have chosen the same one. Where two tokens are closer than ``allowed``, another
            choice is no fault.
        tokens: how many were compared.
        fault: what is wrong; empty = nothing.
        doubt: why a small difference says nothing here (pruning itself matters less than what is allowed); empty = it does.
    """

    batch: str
    compared: str
    difference: float
    allowed: float | None
    same: int
    tokens: int
    fault: str = ""
    doubt: str = ""

    @property
    def verdict(self) -> str:
        """ "ok", "FAILED" or "unsure"."""
        return "FAILED" if self.fault else "unsure" if self.doubt else "ok"


@dataclass(frozen=True)
class ModelReport:
    """What was compared, of which model and with which versions."""

    model: str
    attention: str
    dtype: str
    device: str
    versions: dict[str, str]
    rows: tuple[Row, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong in any row, and some policy's row can tell."""
        pruned = [row.verdict for row in self.rows if row.allowed]
        return not any(row.fault for row in self.rows) and "ok" in pruned

    @property
    def setting(self) -> str:
        """The model and what it ran with, in one line."""
        versions = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        return f"{self.model}, {self.attention} attention, {self.dtype} on {self.device}; {versions}"

    @property
    def summary(self) -> str:
        """The result in one line."""
        if self.ok:
            return "ok: pruned runs give what the masked model gives"
        failed = sum(bool(row.fault) for row in self.rows)
        if failed:
            return f"FAILED: {failed} of {len(self.rows)} comparisons"
        return "unsure: nothing could be told; try float32, or keep less"

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; what is no number is None."""
        rows = [asdict(row) | {"verdict": row.verdict} for row in self.rows]
        for row in rows:
            row.update({name: None for name, x in row.items() if isinstance(x, float) and not isfinite(x)})
        return asdict(self) | {"ok": self.ok, "rows": rows}

    def cells(self) -> list[tuple[str, ...]]:
        """One tuple of texts a row, under ``HEADS``."""
        return [
            (
                row.verdict,
                row.batch,
                row.compared,
                f"{row.difference:.2g}" + ("" if row.allowed is None else f" of {row.allowed:.2g}"),
                f"{row.same}/{row.tokens}",
                row.fault or row.doubt,
            )
            for row in self.rows
        ]

    def __str__(self) -> str:
        cells = [HEADS, *self.cells()]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in cells)
        return "\n".join((self.setting, *lines, self.summary))


def versions() -> dict[str, str]:
    """Of the packages that a run depends on; triton where it is installed."""
    found = {"vlmprune": __version__} | {name: version(name) for name in ("torch", "transformers")}
    with suppress(PackageNotFoundError):
        found["triton"] = version("triton")
    return found
