"""The budgets that published tables are made at: what a method's presets are for."""

from __future__ import annotations

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


def each(setting: str, counts: str = "") -> dict[float, str]:
    """Presets of a method that acts before the language model: the budget, put in at ``{}``, is what every layer gets.

    ``counts`` is added where it is a number of tokens: what the published tables for LLaVA were made with.

    Example:
        >>> presets = each("keep={}", counts=",positions=pack")
        >>> presets[640], presets[0.111]
        ('keep=640,positions=pack', 'keep=0.111')
    """
    budgets = [budget for model in PUBLISHED for budget in model.budgets]
    return {b: setting.format(b) + (counts if isinstance(b, int) else "") for b in budgets}
