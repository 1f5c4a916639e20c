"""Every method with its default settings; those that cannot do without some get them here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from helpers.scorers import SLOPE
from vlmprune.compensation import Discarded
from vlmprune.policies import FasterVLM, PruningPolicy, TokenContext
from vlmprune.policies.registry import BUILT_IN


def echo(images: Sequence[Discarded], candidates: int) -> list[str]:
    """A compensator that repeats the first words of the question."""
    return [" ".join(image.question.split()[:3]) for image in images]


WEIGHTS = Path(__file__).parents[3] / "examples" / "glance" / "weights"


def shuffled(ctx: TokenContext) -> Tensor:
    """A guide that likes some ordinals more than others."""
    return torch.remainder(ctx.ordinals * 7 + 3, 11).float()


REQUIRED: dict[str, dict[str, Any]] = {
    "accm": {"selection": FasterVLM(), "compensator": echo},
    "learned": {"scorer": SLOPE, "layer": 2},
    "sgl": {"guide": shuffled},
}


def usual(name: str, **settings: Any) -> PruningPolicy:
    """The built-in method of this name."""
    return BUILT_IN[name](**(REQUIRED.get(name, {}) | settings))


def typed(name: str) -> str:
    """The same as it is typed."""
    more = {
        "accm": ":selection=fastervlm,compensator=helpers.methods:echo",
        "learned": f":scorer={WEIGHTS},layer=0",
        "sgl": ":guide=helpers.methods:shuffled",
    }
    return name + more.get(name, "")
