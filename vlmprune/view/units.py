"""Counts and durations as tables and the page show them."""

from __future__ import annotations

SIZES = {"T": 1e12, "G": 1e9, "M": 1e6}


def flops(count: int, like: int, unit: str = "FLOP") -> str:
    """``count`` in the unit that suits ``like``, so that numbers to be compared share one.

    >>> flops(52_000_000, 3_100_000_000), flops(52_000_000, 52_000_000, unit=""), flops(7, 7)
    ('0.05 GFLOP', '52.00 M', '7 FLOP')
    """
    for sign, size in SIZES.items():
        if like >= size:
            return f"{count / size:.2f} {sign}{unit}"
    return f"{count} {unit}".rstrip()


def duration(seconds: float) -> str:
    """In milliseconds below a second.

    >>> duration(0.01234), duration(1.5)
    ('12.34 ms', '1.50 s')
    """
    return f"{seconds * 1000:.2f} ms" if seconds < 1 else f"{seconds:.2f} s"
