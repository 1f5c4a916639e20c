"""Schedules over layers as points of a search: a curve (P-Sigmoid) and a searched shape (G-Search), fitted to a budget."""

from __future__ import annotations

import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields

from vlmprune.errors import check
from vlmprune.eval.arms import PromptSize, planned
from vlmprune.policies.base import PruningPolicy
from vlmprune.policies.layer_shares import g_search, p_sigmoid, scheduled
from vlmprune.policies.recipe import read_setting
from vlmprune.policies.syntax import parse

HALVINGS, LEAST = 40, 1e-6
Score = Callable[[PruningPolicy], float]


@dataclass(frozen=True)
class Schedule(ABC):
    """A policy of one stage at each layer from its own on; how much stays where is found for a budget.

    Args:
        of: with settings ``layer``, the first of the stages, and ``keep``, which is replaced.
    """

    of: PruningPolicy

    def __post_init__(self) -> None:
        scheduled(self.of, self.of.layers, (1.0,))  # says what is wrong with it

    def check_budget(self, cut: float, prompt: PromptSize) -> None:
        """Raise InputError where no stages save ``cut`` of the FLOPs of ``prompt``: ``fit`` would, but nothing is asked."""
        least = (LEAST,) * (prompt.shape.layers - self.of.layers[0])
        _largest(self.of, lambda _: least, (0.0, 1.0), cut, prompt)

    @abstractmethod
    def fit(self, cut: float, prompt: PromptSize, score: Score) -> PruningPolicy:
        """The stages that save at least ``cut`` of the FLOPs of ``prompt``, and keep most of those that do.

        Raises InputError where none do. ``score`` is what G-Search goes by: right answers, a share.
        """


@dataclass(frozen=True)
class PSigmoid(Schedule):
    """Shares along a sigmoid of the layer (``policies.p_sigmoid``), whose mean is what the budget leaves.

    Args:
        steepness: per layer; 0 = as many everywhere.
    """

    steepness: int | float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        p_sigmoid(1, self.steepness, 1.0)

    def fit(self, cut: float, prompt: PromptSize, score: Score) -> PruningPolicy:
        depth, first = prompt.shape.layers, self.of.layers[0]
        return _largest(
            self.of,
            lambda mean: p_sigmoid(depth, self.steepness, mean, first=first),
            (first / depth + LEAST, 1.0),
            cut,
            prompt,
        )


@dataclass(frozen=True)
class GSearch(Schedule):
    """The shape of what ``policies.g_search`` finds: the least shares that keep the score, all made larger or smaller alike.

    Costs about log2(levels) scores for each layer, before the search itself.

    Args:
        tolerance: share of right answers that may be lost.
        levels: shares are multiples of one in so many.
    """

    tolerance: float = 0.02
    levels: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.tolerance >= 0, "tolerance", "a number >= 0", repr(self.tolerance))
        check(self.levels >= 1, "levels", "a whole number >= 1", repr(self.levels))

    def fit(self, cut: float, prompt: PromptSize, score: Score) -> PruningPolicy:
        self.check_budget(cut, prompt)
        layers = range(self.of.layers[0], prompt.shape.layers)
        shares = g_search(score, self.of, layers, self.tolerance, levels=self.levels)
        return _largest(
            self.of,
            lambda scale: [min(1.0, share * scale) for share in shares],
            (LEAST, 1 / min(shares)),
            cut,
            prompt,
        )


SCHEDULES: dict[str, type[Schedule]] = {"p_sigmoid": PSigmoid, "g_search": GSearch}


def read_schedule(text: str) -> Schedule | None:
    """A schedule as typed, ``p_sigmoid:of=(fastv:layer=1),steepness=2``; None for any other text.

    Raises:
        InputError: an unknown or missing setting, or one that does not fit.

    Example:
        >>> read_schedule("p_sigmoid:of=(knorm:layer=1),steepness=2").steepness
        2
    """
    if text.partition(":")[0].strip() not in SCHEDULES:
        return None
    typed = parse(text)
    name = typed.pop("policy")
    check(name in SCHEDULES, "policy", f"{text.partition(':')[0]} by itself", repr(text))
    kind = SCHEDULES[name]
    hints = typing.get_type_hints(kind)
    for setting in typed:
        check(setting in hints, name, f"some of {', '.join(hints)}", repr(setting))
    missing = [f.name for f in fields(kind) if f.default is MISSING and f.name not in typed]
    check(not missing, name, "of=(POLICY)", "none")
    return kind(**{setting: read_setting(value, hints[setting], setting) for setting, value in typed.items()})


def _largest(
    of: PruningPolicy,
    shares: Callable[[float], Sequence[float]],
    ends: tuple[float, float],
    cut: float,
    prompt: PromptSize,
) -> PruningPolicy:
    """The schedule of the largest number between two ends, with which the shares grow, that meets the budget."""
    layers = range(of.layers[0], prompt.shape.layers)

    def made(number: float) -> PruningPolicy:
        return scheduled(of, layers, shares(number))

    def saved(number: float) -> float:
        return planned(made(number), prompt)[0]

    low, high = ends
    check(saved(low) >= cut, "budget", f"a cut of at most {saved(low):.4f}", f"{cut:g}")
    if saved(high) >= cut:
        return made(high)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if saved(middle) >= cut else (low, middle)
    return made(low)
