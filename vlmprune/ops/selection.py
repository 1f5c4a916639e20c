"""How survivors are chosen once scores are there: one object, as ``Scoring`` is for the scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Required, TypedDict

import torch
from torch import Tensor

from vlmprune.errors import check
from vlmprune.ops._checks import check_choice, check_count, check_tensor, seq_len

PADDINGS = ("right", "left")
CODES = 4
"""A column's code is 0 (competes), 1 (stays, beyond ``keep``), 2 (goes) or 3 (competes, and stays in any case)."""


class SelectionKeywords(TypedDict, total=False):
    """The keywords of every op that drops tokens: see ``prune_tokens``, which describes them."""

    keep: Required[int | Tensor]
    width: int | None
    most: int | None
    code: Tensor | None
    segments: Tensor | None
    newest: bool
    padding: Literal["right", "left"]


class Selection(NamedTuple):
    """The keywords, defaults filled in. A custom op takes it as ``*selection``."""

    keep: int  # of every segment; nothing where there is a quota
    width: int
    most: int
    quota: Tensor | None = None
    code: Tensor | None = None
    segments: Tensor | None = None
    newest: bool = False
    left: bool = False
    at: Tensor | None = None
    at_mask: Tensor | None = None

    def reach(self, tensors: Sequence[Tensor]) -> int:
        """How many positions ``at`` counts, those of the tensors."""
        return seq_len(tensors[0]) if self.at_mask is None else self.at_mask.shape[1]

    def keywords(self) -> dict[str, Any]:
        """What an op that selects is called with for this."""
        return {
            "keep": self.keep if self.quota is None else self.quota,
            "width": self.width,
            "most": self.most,
            "code": self.code,
            "segments": self.segments,
            "newest": self.newest,
            "padding": "left" if self.left else "right",
            **({} if self.at is None else {"at": self.at, "at_mask": self.at_mask}),
        }

    @classmethod
    def checked(
        cls,
        like: Tensor,
        B: int,
        N: int,
        rows: int,
        packed: bool = False,
        past: bool = False,
        *,
        keep: int | Tensor,
        width: int | None = None,
        most: int | None = None,
        code: Tensor | None = None,
        segments: Tensor | None = None,
        newest: bool = False,
        padding: str = "right",
        at: Tensor | None = None,
        at_mask: Tensor | None = None,
    ) -> Selection:
        """Check the keywords for ``N`` columns of ``B`` samples, all but the entries of tensors (``check_values``).

        Args:
            like: a tensor on the device of the call.
            rows: positions of the tensors that are shortened.
            packed: whether the samples lie end to end.
            past: whether there are positions before those of the tensors, where columns may be too.
        """
        check_tensor("segments", segments, [torch.int64], (B, "G"), like)
        G = None if segments is None else segments.shape[-1]
        if isinstance(keep, Tensor):
            check_tensor("keep", keep, [torch.int64], (B,) if G is None else (B, G), like)
        else:
            check_count("keep", keep, N if G is None else None)
        check_tensor("code", code, [torch.int8], (B, N), like)
        check(code is None or not packed, "code", "None with cu_seqlens", "a tensor")
        check_choice("padding", padding, PADDINGS)
        check(padding == "right" or not packed, "padding", "'right' with cu_seqlens", repr(padding))
        check(isinstance(newest, bool), "newest", "True or False", repr(newest))
        plain = isinstance(keep, int) and code is None and segments is None
        for name, number, bound in (("width", width, rows), ("most", most, N)):
            if number is not None:
                check_count(name, number, bound)
        if width is None:
            width = rows - N + keep if plain and B == 1 and not packed and not past else rows  # type: ignore[assignment]
        if most is None:
            most = keep if plain else N  # type: ignore[assignment]
        cap, quota = (0, keep) if isinstance(keep, Tensor) else (keep, None)
        left = padding == "left"
        return cls(cap, width, most, quota, code, segments, newest, left, at, at_mask)  # type: ignore[arg-type]

    def check_values(self, columns: Tensor) -> None:
        """Codes and segments of CPU tensors are what they may be, and columns ascend. Looking would wait for a GPU."""
        if columns.device.type != "cpu":
            return
        name, places = ("columns", columns) if self.at is None else ("at", self.at)
        real = places >= 0
        rises = (places[:, 1:] > places[:, :-1]) | ~real[:, 1:]
        fits = bool((rises & (real[:, :-1] | ~real[:, 1:])).all())
        check(fits, name, "positions that ascend, then -1 only", "others")
        if self.code is not None:
            check(bool(((self.code >= 0) & (self.code < CODES)).all()), "code", "0, 1, 2 or 3", "others")
        if self.segments is not None:
            fits = bool((self.segments >= 0).all() and (self.segments.sum(1) <= columns.shape[1]).all())
            check(
                fits,
                "segments",
                f"lengths >= 0 of at most {columns.shape[1]} columns",
                self.segments.tolist(),
            )
