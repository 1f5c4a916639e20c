"""Methods as studies ask them: the paper's layers scaled to a model, positions kept and packed, and what a depth leaves room for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from vlmprune import policy_from
from vlmprune.errors import InputError, check
from vlmprune.policies.base import PruningPolicy
from vlmprune.view.fitting import TOWER, scaled

__all__ = ["KEEP", "PACK", "TOWER", "placed", "scaled", "that_fit"]

KEEP, PACK = "keep", "pack"


def that_fit(texts: Mapping[str, str], depth: int) -> tuple[dict[str, PruningPolicy], list[str]]:
    """The policies that ``texts`` say, by the same names, and why a decoder of ``depth`` layers has no room for the others.

    In a shallow decoder two scaled layers may be one, or a later one lie behind the last.
    """
    fit, left_out = {}, []
    for name, text in texts.items():
        try:
            policy = policy_from(text)
            check(policy.layers[-1] < depth, "layers", f"some in 0..{depth - 1}", policy.layers)
            fit[name] = policy
        except InputError as error:
            left_out.append(f"{name}: {error}")
    return fit, left_out


def placed(policy: PruningPolicy) -> dict[str, PruningPolicy]:
    """The policy with its positions kept, and packed; empty if it has no such setting."""
    if "positions" not in policy.__dataclass_fields__:
        return {}
    return {where: replace(policy, positions=where) for where in (KEEP, PACK)}  # type: ignore[call-arg]
