"""How many tokens stay: what a share or a number per image comes to."""

from __future__ import annotations

from collections.abc import Sequence


def keep_count(keep: float, tokens: int, images: float = 1, spend: str = "prompt") -> int:
    """How many of the ``tokens`` of ``images`` images survive: never more than there are, and one at least.

    Args:
        keep: a share of the tokens (float), or a number per image (int).
        tokens: tokens of the images together.
        images: how many they are; part of one counts for its share.
        spend: "prompt" counts them together, "image" and "crop" as many times what one of equal images keeps.

    Example:
        >>> keep_count(0.5, 576), keep_count(64, 576), keep_count(64, 1152, images=2)
        (288, 64, 128)
    """
    if spend != "prompt" and tokens:
        return min(tokens, round(images * keep_count(keep, round(tokens / images))))
    wanted = keep * (images if isinstance(keep, int) else tokens)
    return min(tokens, max(1, int(wanted + 1e-6)))


def thinned(keep: float, tokens: int, images: float) -> int:
    """The same where one of several has to go: SparseVLM's ``min(k, n - 1)``. A share of 1.0 is everything."""
    if isinstance(keep, float) and keep == 1.0:
        return tokens
    return min(tokens, max(1, min(keep_count(keep, tokens, images), tokens - 1)))


def union_count(one: int, other: int, tokens: int) -> int:
    """How many of ``tokens`` are expected in the union of two choices that know nothing of each other."""
    return one + other - round(one * other / max(tokens, 1))


def even_shares(total: int, sizes: Sequence[int]) -> list[int]:
    """``total`` shared out evenly, nobody getting more than their size; of what is left over the first get one each.

    Example:
        >>> even_shares(10, [2, 9, 9]), even_shares(11, [4, 4, 4])
        ([2, 4, 4], [4, 4, 3])
    """
    level, left, open_ones = 0, total, sorted(sizes)
    for i, size in enumerate(open_ones):
        here = min(size - level, left // (len(open_ones) - i))
        level, left = level + here, left - here * (len(open_ones) - i)
        if level < size:
            break
    shares = [min(level, size) for size in sizes]
    for i, size in enumerate(sizes):
        if left and size > shares[i]:
            shares[i], left = shares[i] + 1, left - 1
    return shares
