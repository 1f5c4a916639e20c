"""Rows that stages set aside, and the stage that brings them back (``Needs(restored=True)``).

Which visual tokens stand in the sequence may so grow again: a row that comes back stands in its own place, at its own
position, with the hidden state with which it left. The layers between hold neither its key nor its value.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmprune.errors import ModelError
from vlmprune.models.layout import put
from vlmprune.models.prefill import Decision, Entering, Prefill
from vlmprune.models.waves import Waves


def set_aside(prefill: Prefill, entering: Entering, made: Decision, module: Any) -> None:
    """Keep the rows that enter a stage which drops some of them, if a later one is to bring them back.

    Raises:
        ModelError: at decoder layer ``module`` whose replay (gradient checkpointing) would know nothing of them, or where
            texts have taken the places of some.
    """
    if entering.layer >= prefill.wants.restores:
        return
    if module.training and module.gradient_checkpointing:
        raise ModelError("gradient checkpointing: expected none with a stage that brings tokens back")
    if made.inserted is not None:
        raise ModelError(
            "policy: expected no texts before a stage that brings tokens back (they stand in the places of some)"
        )
    prefill.aside = _all_rows(prefill, entering)
    if entering.layer < prefill.wants.wave_layer:
        prefill.waves = Waves(prefill.cache, prefill.call.past, prefill.aside)


def brought_back(prefill: Prefill, entering: Entering) -> tuple[Entering, Decision | None]:
    """What enters a stage that brings tokens back, and the decision that all of it stays; None where nothing was set aside."""
    i, wants = entering.layer, prefill.wants
    if not wants.needs[i].restored or entering.layout.origin is None:
        return entering, None
    rows, first = _all_rows(prefill, entering), entering.first
    if i == wants.restores:
        prefill.aside = None
    cos, sin = entering.first_rope
    order = torch.arange(first.length, device=rows.device).expand(len(rows), -1)
    whole = entering._replace(layout=first, hidden=rows, rope=(cos, sin), shift=None)
    return whole, Decision(first, order, (cos.detach(), sin.detach()))


def _all_rows(prefill: Prefill, entering: Entering) -> Tensor:
    """``[B, q, D]`` those that enter, in the places that they had before any stage, among those that are set aside."""
    origin, hidden = entering.layout.origin, entering.hidden
    if origin is None:
        return hidden
    assert prefill.aside is not None
    return put(prefill.aside.to(hidden.device), origin, hidden)
