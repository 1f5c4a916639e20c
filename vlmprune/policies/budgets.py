"""The budgets that published tables are made at: what a method's presets are for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Published(NamedTuple):
    """A model's budgets, largest first.

    Attributes:
        model: as tables call it.
        layers: its decoder layers, over whose inputs a budget is a mean.
        visual: visual tokens of one image (LLaVA-NeXT's: five crops of 576); None = as many as the image has.
        budgets: visual tokens of one image (int) or shares of them (float).
    """

    model: str
    layers: int
    visual: int | None
    budgets: tuple[float, ...]


PUBLISHED = (
    Published("LLaVA-1.5-7B", 32, 576, (192, 128, 64)),
    Published("LLaVA-NeXT-7B", 32, 2880, (640, 320, 160)),
    Published("Qwen2.5-VL-7B", 28, None, (0.333, 0.222, 0.111)),
)


def each(setting: str, counts: str = "", of: Mapping[float, float] | None = None) -> dict[float, str]:
    """Presets of a method that acts before the language model: the budget, put in at ``{}``, is what every layer gets.

    Args:
        setting: as typed on the command line.
        counts: is added where the budget is a number of tokens: what the published tables for LLaVA were made with.
        of: by budget, what is put in instead, where layers get unlike numbers; only these budgets then have a preset.

    Example:
        >>> presets = each("keep={}", counts=",positions=pack")
        >>> presets[640], presets[0.111]
        ('keep=640,positions=pack', 'keep=0.111')
        >>> each("layer=2,keep={}", of={192: 166})
        {192: 'layer=2,keep=166'}
    """
    own = {budget: budget for model in PUBLISHED for budget in model.budgets} if of is None else of
    return {b: setting.format(put) + (counts if isinstance(b, int) else "") for b, put in own.items()}
