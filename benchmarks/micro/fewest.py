"""The fewest bytes and FLOPs of each case: every input read once, every output written once, every product formed once."""

from __future__ import annotations

from torch import Tensor

from .inputs import Inputs

INT64 = 8


def key_bytes(x: Inputs, positions: int) -> int:
    return positions * x.model.kv_heads * x.model.head_dim * x.dtype.itemsize


def query_bytes(x: Inputs) -> int:
    """The listed rows, and their positions."""
    return x.setting.n_rows * (x.model.heads * x.model.head_dim * x.dtype.itemsize + INT64)


def row_stats_bytes(x: Inputs) -> int:
    return 4 * x.model.heads * x.setting.n_rows


def score_bytes(x: Inputs) -> int:
    """Keys of the visual tokens, the rows and their LSE; columns in, scores out."""
    columns = x.shape.visual * (INT64 + 4)
    return key_bytes(x, x.shape.visual) + query_bytes(x) + row_stats_bytes(x) + columns


def score_flops(x: Inputs, keys: int) -> int:
    return 2 * x.setting.n_rows * x.model.heads * x.model.head_dim * keys


def copy_bytes(tensors: list[Tensor], kept: int) -> int:
    """Kept rows read and written, and the index."""
    rows = sum(t.numel() // t.shape[-2] * t.element_size() for t in tensors)
    return 2 * kept * rows + kept * INT64


def feature_bytes(x: Inputs, rows: int) -> int:
    return rows * x.model.hidden * x.dtype.itemsize


def pairs(x: Inputs) -> int:
    """Each pair of visual tokens once."""
    return x.shape.visual * (x.shape.visual - 1) // 2
