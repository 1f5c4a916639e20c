"""Settings of methods of several stages: one value for all of them or one for each, and how many tokens a drop leaves."""

from __future__ import annotations

from collections.abc import Callable

from vlmprune.errors import check
from vlmprune.policies.checks import check_keep, is_number
from vlmprune.policies.counts import keep_count

EachStage = int | float | tuple[int | float, ...]
"""The same number at every stage, or a tuple of one for each."""


def check_each_stage(
    name: str,
    setting: EachStage | None,
    layers: tuple[int, ...],
    check_one: Callable[[object], None] = check_keep,
) -> None:
    """``setting`` is what ``check_one`` accepts, a tuple of as many of these as there are ``layers``, or None."""
    if setting is None:
        return
    each = setting if isinstance(setting, tuple) else (setting,) * len(layers)
    for one in each:
        check_one(one)
    check(len(each) == len(layers), name, f"{len(layers)} entries, one per layer", repr(setting))


def at_stage(setting: EachStage, layers: tuple[int, ...], layer: int) -> int | float:
    """What a setting is at one of the layers.

    Example:
        >>> at_stage((8, 0.5), (3, 5), 5), at_stage(8, (3, 5), 5)
        (0.5, 8)
    """
    return setting[layers.index(layer)] if isinstance(setting, tuple) else setting


def kept_at(keep: EachStage | None, layers: tuple[int, ...], layer: int, tokens: int, images: float) -> int:
    """How many of the ``tokens`` of so many images stay at one of the layers.

    Raises:
        InputError: ``keep`` is None, so that the data decide.
    """
    check(keep is not None, "keep", "a number or share for counts that are known in advance", None)
    assert keep is not None
    return keep_count(at_stage(keep, layers, layer), tokens, images)


def check_drop(drop: object) -> None:
    """``drop`` is a share of the tokens, a float in [0, 1), or a number of them per image, an int."""
    right = is_number(drop) and drop >= 0 and (isinstance(drop, int) or drop < 1)
    check(right, "drop", "a share in [0, 1) or a whole number >= 0", repr(drop))


def left_after(drop: float, tokens: int, images: float) -> int:
    """How many of the ``tokens`` of so many images stay where a share (float) or a number per image (int) goes: one at least.

    Example:
        >>> left_after(0.5, 17, images=1), left_after(30, 80, images=2)
        (8, 20)
    """
    if isinstance(drop, float):
        return keep_count(1 - drop, tokens)
    return min(tokens, max(1, round(tokens - drop * images)))
