"""A method set for one model and one budget: layers at the paper's relative depth, and as many tokens as the budget says."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

from vlmprune.errors import InputError, check, first_line
from vlmprune.flops import mean_tokens, visual_inputs
from vlmprune.policies.base import PruningPolicy
from vlmprune.policies.budgets import PUBLISHED
from vlmprune.policies.recipe import policy_from, to_text
from vlmprune.policies.registry import BUILT_IN, policy_class
from vlmprune.policies.schedule import keep_for_mean_tokens, stage_counts, wave_rows

DECODER, TOWER = 32, 24
"""Layers of LLaVA-1.5's decoder and vision tower, which defaults and presets are given for."""
LAYERS = {"layer": DECODER, "layers": DECODER}
"""Settings that are layers, and of how many."""
OF_OURS = (
    LAYERS
    | dict.fromkeys(("look", "scatter", "prune", "stages"), DECODER)
    | dict.fromkeys(("shallow_layer", "vision_layers", "early_layer", "object_layer"), TOWER)
)
"""The same of built-in policies; another package's may call something else by these names."""
LEAST, HALVINGS = 1e-9, 40


class Size(NamedTuple):
    """What a setting depends on: decoder layers, layers of the vision tower, visual tokens of one image."""

    layers: int
    tower: int
    visual: int


@dataclass(frozen=True)
class Fitted:
    """A method as it is asked.

    Attributes:
        policy: with its settings.
        mean: visual tokens that these leave, a mean over the inputs of the model's layers.
        meets: whether that is the budget; if not, the layers that see every token alone cost more, and the budget is that of
            the layers behind them, as far as the method comes down to it.
    """

    policy: PruningPolicy
    mean: float
    meets: bool

    @property
    def text(self) -> str:
        """The policy as typed."""
        return to_text(self.policy)


def fit(name: str, budget: float, size: Size) -> Fitted:
    """A method by its name: published settings where there are some, scaled to the model, and fitted to a budget.

    Args:
        name: one of ``vlmprune.list_policies()``.
        budget: visual tokens of one image, a mean over the inputs of the decoder's layers.
        size: of the model.

    Raises:
        InputError: an unknown name; a method that has to be given settings, keeps no share, has no room in so few layers, or
            cannot be typed.

    Example:
        >>> fit("feather", 192, Size(layers=8, tower=4, visual=576)).text
        'feather:layers=2/4,keep=0.22'
    """
    check(1 <= budget <= size.visual, "budget", f"visual tokens from 1 to {size.visual}", budget)
    policy = to_depth(_published(name), size)
    check(policy.layers[-1] < size.layers, name, f"stages at layers 0..{size.layers - 1}", policy.layers)
    try:
        fitted, meets = policy.at(keep_for_mean_tokens(policy, budget, size.layers, size.visual)), True
    except InputError:
        least = policy.at(LEAST)  # raises where there is no share at all
        if mean_of(least, size) <= budget:
            raise
        fitted, meets = _behind(policy, budget, size), False
    to_text(fitted)  # a policy that cannot be typed is told here, before anything runs
    return Fitted(fitted, mean_of(fitted, size), meets)


def to_depth(policy: PruningPolicy, size: Size) -> PruningPolicy:
    """The policy with those settings that are layers of LLaVA-1.5's 32 (and 24) at the same relative depth of ``size``.

    Raises:
        InputError: settings that so few layers leave no room for.
    """
    changed: dict[str, Any] = {}
    known = OF_OURS if type(policy) in BUILT_IN.values() else LAYERS
    for setting in fields(policy):
        of, value = known.get(setting.name), getattr(policy, setting.name)
        if of is None or not setting.init:
            continue
        depth = size.tower if of == TOWER else size.layers
        if isinstance(value, tuple) and all(map(_is_layer, value)):
            changed[setting.name] = tuple(dict.fromkeys(scaled(layer, depth, of) for layer in value))
        elif _is_layer(value):
            changed[setting.name] = scaled(value, depth, of)
    try:
        return replace(policy, **changed)
    except InputError:
        raise
    except ValueError as error:  # a foreign policy's own way to refuse a setting
        raise InputError(f"{type(policy).__name__}: {first_line(error)}") from error


def _is_layer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def scaled(layer: int, depth: int, of: int = DECODER) -> int:
    """A layer of ``of`` at the nearest relative depth of a model of ``depth`` layers: 0 stays 0, others are at least 1.

    >>> scaled(16, 8), scaled(3, 8), scaled(5, 4, TOWER), scaled(31, 8), scaled(0, 8)
    (4, 1, 1, 7, 0)
    """
    return min(max(1, round(layer * depth / of)), depth - 1) if layer else 0


def _published(name: str) -> PruningPolicy:
    """The method with a published table's settings, or its defaults; of either a share that any depth can have."""
    presets = policy_class(name).presets
    budgets = [budget for budget in PUBLISHED[0].budgets if budget in presets]
    policy = policy_from(f"{name}:{presets[budgets[0]]}" if budgets else name)
    return policy.at(0.5)


def mean_of(policy: PruningPolicy, size: Size) -> float:
    """Visual tokens of one image that a policy leaves, a mean over the inputs of the model's layers."""
    return mean_tokens(_inputs(policy, size))


def _behind(policy: PruningPolicy, budget: float, size: Size) -> PruningPolicy:
    """The policy of which those layers meet the budget that lie behind the last one with every token."""
    least = f"a budget of at least {mean_of(policy.at(LEAST), size):.3g} visual tokens"
    whole = [tokens >= size.visual for tokens in _inputs(policy.at(LEAST), size)]
    check(True in whole, type(policy).__name__, least, budget)
    first = size.layers - whole[::-1].index(True)

    def cost(share: float) -> float:
        return mean_tokens(_inputs(policy.at(share), size)[first:])

    low, high = LEAST, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) <= budget else (low, middle)
    reached = cost(low)
    short = (int(low * 10**digits) / 10**digits for digits in range(1, 10))
    return policy.at(next((share for share in short if share > 0 and cost(share) == reached), low))


def _inputs(policy: PruningPolicy, size: Size) -> list[float]:
    """Visual tokens of one image that enter each layer."""
    stages = stage_counts(policy, size.visual)
    return visual_inputs(size.layers, size.visual, stages, wave_rows(policy, stages, 0))
