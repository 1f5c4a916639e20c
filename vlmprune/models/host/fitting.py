"""Which policies work on a family of models, by what both declare: no model is loaded."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vlmprune.errors import check, check_known
from vlmprune.models.host.families import FAMILIES, REFUSED
from vlmprune.policies.base import PruningPolicy

KEEP: dict[str, Any] = {"positions": "keep"}


def settings_for(family: str, policy: PruningPolicy) -> dict[str, Any] | None:
    """With which settings beside its own a policy works on a family; None = with none.

    Towers of all families can be read, so what is left is where tokens stand: positions of three dimensions (Qwen-VL) can
    neither be packed, which a setting ``positions`` may turn off, nor moved up behind texts that join the prompt. A policy
    whose stages lie beyond the last layer of a small model is refused there whatever the family.

    Args:
        family: a ``config.model_type``.
        policy: says by ``packs`` and ``inserts`` what it does.

    Raises:
        InputError: nothing is known of this family, or it cannot be pruned.

    Example:
        >>> from vlmprune import FasterVLM
        >>> released = FasterVLM(positions="pack")
        >>> settings_for("qwen2_5_vl", FasterVLM()), settings_for("qwen2_5_vl", released), settings_for("llava", released)
        ({}, {'positions': 'keep'}, {})
    """
    why = f"{family!r} ({REFUSED.get(family)})"
    check(family not in REFUSED, "family", f"one of {', '.join(FAMILIES)}", why)
    check_known(family, FAMILIES, "family")
    if FAMILIES[family].packs:
        return {}
    if policy.inserts:
        return None
    if not policy.packs:
        return {}
    if "positions" not in policy.__dataclass_fields__:
        return None
    return None if replace(policy, **KEEP).packs else dict(KEEP)
