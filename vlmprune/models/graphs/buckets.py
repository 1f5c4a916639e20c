"""Which prompts share a graph: those of the same images whose text is about as long."""

from __future__ import annotations

LEAST = 16


def rounded(n: int) -> int:
    """The next length at or above ``n`` that has a graph: a multiple of 16, above 256 of a sixteenth of the power of two below.

    Example:
        >>> [rounded(n) for n in (1, 16, 17, 250, 300, 520)]
        [16, 16, 32, 256, 304, 544]
    """
    step = max(LEAST, 1 << (n.bit_length() - 5)) if n > LEAST else LEAST
    return -(-n // step) * step


def bucket(real: tuple[int, ...], counts: tuple[int, ...]) -> int:
    """Rows of a graph for samples of so many tokens, ``counts`` of them visual: room for the text rounded up."""
    text = max(n - visual for n, visual in zip(real, counts, strict=True))
    return max(counts) + rounded(text)
