"""What the launcher of the score kernel decides from a Scoring: shared programs, registers, row statistics."""

from typing import Any, NamedTuple

import torch
import triton

from vlmprune.triton_kernels.row_lse import row_lse

TARGET_PROGRAMS = (
    128  # about one program for each multiprocessor of a large GPU; fixed, so that sums keep their order
)


class Selection(NamedTuple):
    """What the score kernel chooses by, and where it writes its choice; without ``index`` it leaves that to select_topk."""

    keep: Any = None
    spread: torch.Tensor | None = None
    code: torch.Tensor | None = None
    index: torch.Tensor | None = None  # type: ignore[assignment]  # shadows tuple.index
    count: torch.Tensor | None = None  # type: ignore[assignment]
    cu_seqlens_out: torch.Tensor | None = None


def head_splits(B, Hkv, tiles_n):
    """How many programs share the heads of a column tile; from shapes only, so results repeat bit for bit."""
    wanted = triton.cdiv(TARGET_PROGRAMS, B * tiles_n)
    return next(n for n in range(1, Hkv + 1) if Hkv % n == 0 and (n >= wanted or n == Hkv))


def registers(s, R, num_warps):
    """How many registers a thread may take: said aloud, as ptxas would rather spill a word than pass 128.

    Few rows are memory bound: two programs shall share a multiprocessor, as those of 4 warps do with any number. No lower
    limit for these: ptxas fills it with loads ahead of their use, and spills. AMD knows no such option.
    """
    if torch.version.hip:
        return {}
    few_rows = R <= 16 and s.cos is None and s.query.element_size() == 2
    return {"maxnreg": 128 if few_rows and num_warps == 8 else 255}


def row_statistics(s):
    """The log-sum-exp of the rows, [B, H, Sq] if it was given, else [B, H, R]; None for plain logits."""
    if s.normalize == "none" or s.lse is not None:
        return s.lse
    return row_lse(s)
