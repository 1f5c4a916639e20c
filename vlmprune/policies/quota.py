"""Stages with counts of their own: their checks, and SparseVLM's count."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmprune.errors import check
from vlmprune.policies.base import TokenContext, check_layer, quotas


def thinned(ctx: TokenContext, keep: float) -> list[int]:
    """How many tokens each sample keeps where at least one of several has to go: SparseVLM's ``min(k, n - 1)``."""
    wanted = quotas(ctx, keep)
    return [min(n, max(1, min(k, n - 1))) for k, n in zip(wanted, ctx.counts, strict=True)]


def entries(value: object, name: str) -> tuple[Any, ...]:
    """``value`` as a tuple. Raises InputError unless it is one, or a list."""
    check(isinstance(value, tuple | list), name, "one entry per layer, in a tuple", repr(value))
    assert isinstance(value, tuple | list)
    return tuple(value)


def check_layers(layers: object, least: int, why: str = "") -> None:
    """Raise ValueError unless ``layers`` are whole numbers of at least ``least``, ascending, one or more."""
    ok = isinstance(layers, tuple | list) and len(layers) > 0
    check(ok, "layers", "one or more layers, ascending", repr(layers))
    assert isinstance(layers, tuple | list)
    for layer in layers:
        check_layer(layer, least, why)
    check(list(layers) == sorted(set(layers)), "layers", "one or more layers, ascending", repr(layers))


def check_schedule(
    tokens: int, keep: tuple[int | float, ...], layers: tuple[int, ...], known: Mapping[int, tuple[int, ...]]
) -> None:
    """Raise ValueError unless the budget is a published one, or ``keep`` has one valid count per layer."""
    named = ", ".join(map(str, known))
    check(bool(keep) or tokens in known, "tokens", f"one of {named}, or an explicit keep", repr(tokens))
    schedule = keep or known[tokens]
    check(len(schedule) == len(layers), "keep", f"{len(layers)} counts, one per layer", repr(schedule))
    for count in schedule:
        ok = isinstance(count, int | float) and not isinstance(count, bool)
        ok = ok and (0.0 < count <= 1.0 if isinstance(count, float) else count >= 1)
        check(ok, "keep", "shares in (0, 1] or whole numbers of tokens per image >= 1", repr(schedule))
