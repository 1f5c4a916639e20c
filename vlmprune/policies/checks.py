"""Settings: as plain data, as text, and their checks, of which every one raises InputError with name, expected and got."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from types import FunctionType
from typing import Any, TypeGuard

import numpy as np

from vlmprune.errors import InputError, check, nearest

BEFORE = " (the score comes from the layer before)"
"""Why a stage cannot be at layer 0."""

SEEDS = 1 << 63
"""How many seeds a generator takes."""


def plain(value: Any) -> Any:
    """``value`` with Python's own numbers for numpy's, and a tuple for every list and array."""
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    return tuple(map(plain, value)) if type(value) in (tuple, list) else value


def check_word(name: str, value: object, *words: str) -> None:
    """``value`` is one of ``words``.

    Example:
        >>> check_word("rows", "last", "last", "mean")
    """
    *most, last = map(repr, words)
    if value not in words:
        raise InputError(
            f"{name}: expected {', '.join(most)} or {last}, got {value!r}{nearest(value, words)}"
        )


def check_whole(name: str, value: object, least: int | None = None, why: str = "") -> None:
    """``value`` is an int, and of at least ``least`` if that is given.

    Example:
        >>> check_whole("stride", 0, least=1)
        Traceback (most recent call last):
            ...
        vlmprune.errors.InputError: stride: expected a whole number >= 1, got 0
    """
    ok = isinstance(value, int) and not isinstance(value, bool) and (least is None or value >= least)
    check(ok, name, "a whole number" if least is None else f"a whole number >= {least}{why}", repr(value))


def check_seed(seed: object) -> None:
    """``seed`` is one that every generator takes."""
    ok = isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed < SEEDS
    check(ok, "seed", "a whole number in [0, 2**63)", repr(seed))


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether ``value`` is an int or a float, and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_share(name: str, value: object) -> None:
    """``value`` is a number in [0, 1]."""
    check(is_number(value) and 0 <= value <= 1, name, "a share in [0, 1]", repr(value))


def check_flag(name: str, value: object) -> None:
    """``value`` is True or False."""
    check(isinstance(value, bool), name, "True or False", repr(value))


def check_number(name: str, value: object, above: float | None = None, least: float | None = None) -> None:
    """``value`` is a finite number, larger than ``above`` or at least ``least`` if one of them is given.

    Example:
        >>> check_number("temperature", 0.0, above=0)
        Traceback (most recent call last):
            ...
        vlmprune.errors.InputError: temperature: expected a number > 0, got 0.0
    """
    low, floor = (float("-inf") if end is None else end for end in (above, least))
    ok = is_number(value) and low < value < float("inf") and value >= floor
    ends = "" if above is None else f" > {above}", "" if least is None else f" >= {least}"
    check(ok, name, f"a number{''.join(ends)}", repr(value))


def check_keep(keep: object, name: str = "keep", counts: bool = True) -> None:
    """``keep`` is a share, a float in (0, 1], or where ``counts`` are taken a number of tokens per image, an int.

    Example:
        >>> check_keep(0.5), check_keep(64)
        (None, None)
    """
    share = isinstance(keep, float) and 0.0 < keep <= 1.0
    if counts:
        whole = isinstance(keep, int) and not isinstance(keep, bool) and keep >= 1
        check(
            share or whole, name, "a share in (0, 1] or a whole number of tokens per image >= 1", repr(keep)
        )
    else:
        check(share, name, "a share in (0, 1] as a float (1.0 is everything)", repr(keep))


def share_of(share: object) -> float:
    """``share`` as Python's float: one in (0, 1]."""
    share = plain(share)
    check_keep(share, "share", counts=False)
    assert isinstance(share, float)
    return share


def check_layer(layer: object, least: int = 0, why: str = "") -> None:
    """``layer`` is an int of at least ``least``.

    Example:
        >>> check_layer(2, least=1)
    """
    check_whole("layer", layer, least, why)


def check_layers(layers: object, least: int, why: str = "", two: bool = False) -> None:
    """``layers`` are ints of at least ``least``, ascending: two, or one or more.

    Example:
        >>> check_layers((8, 16), least=1)
    """
    wanted = f"{'two' if two else 'one or more'} layers, ascending"
    some = isinstance(layers, tuple) and (len(layers) == 2 if two else len(layers) > 0)
    check(some, "layers", wanted, repr(layers))
    assert isinstance(layers, tuple)
    for layer in layers:
        check_layer(layer, least, why)
    check(list(layers) == sorted(set(layers)), "layers", wanted, repr(layers))


def check_schedule(
    tokens: int, keep: object, layers: tuple[int, ...], known: Mapping[int, tuple[int, ...]]
) -> None:
    """``tokens`` is a published budget, or ``keep`` has one share or count per layer."""
    check(isinstance(keep, tuple), "keep", "one entry per layer, in a tuple", repr(keep))
    named = ", ".join(map(str, known))
    check(bool(keep) or tokens in known, "tokens", f"one of {named}, or an explicit keep", repr(tokens))
    schedule = keep or known[tokens]
    assert isinstance(schedule, tuple)
    check(len(schedule) == len(layers), "keep", f"{len(layers)} counts, one per layer", repr(schedule))
    for entry in schedule:
        check_keep(entry)


def spelt(policy: Any) -> dict[str, str]:
    """A policy's settings as text, functions as ``policy_from`` reads them: what ``repr`` shows where some are functions."""
    settings = {field.name: getattr(policy, field.name) for field in fields(policy) if field.repr}
    return {
        name: f"{value.__module__}:{value.__qualname__}" if isinstance(value, FunctionType) else repr(value)
        for name, value in settings.items()
    }
