"""Every method that can pack positions, twice at each budget: with the positions kept, and with them packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from vlmprune import policy_from
from vlmprune.errors import InputError
from vlmprune.eval.arms import UNPRUNED, Arm, PromptSize, fit_arm
from vlmprune.policies import VTW
from vlmprune.policies.base import PruningPolicy

KEEP, PACK = "keep", "pack"


def methods(depth: int, tower: int) -> list[str]:
    """The methods as typed, those of before the language model first.

    Their layers are scaled from 32 of a decoder to ``depth``, and from 24 of a vision tower to ``tower``.

    One that begins at a quarter of the layers cannot save 83 %: it stands here a second time, beginning at layer 1.
    """
    eighth = depth // 8
    one, two, four, six = (max(1, eighth * k) for k in (1, 2, 4, 6))
    return [
        "divprune",
        "cdpruner",
        "vispruner",
        "fastervlm",
        "visionzip",
        "accm_selection",
        "folder",
        f"vscan:layer={four},shallow_layer={5 * tower // 24}",
        f"aim:layer={four},stages={two}",
        f"pyramiddrop:layers={two}/{four}/{six}",
        f"pyramiddrop:layers=1/{two}/{four}",
        f"sparsevlm:layers={one}/{two}/{four},keep=0.5/0.5/0.5",
        f"ficoco:layers={'/'.join(map(str, range(max(2, depth * 6 // 32), depth)))}",
        f"ficoco:layers={'/'.join(map(str, range(1, max(2, two) + 1)))}",
        f"vtw:layer={two}",
        f"vtw:layer={four}",
    ]


def make_arms(
    texts: Sequence[str], budgets: Sequence[float], prompt: PromptSize
) -> tuple[list[Arm], list[str]]:
    """The unpruned model, then each method kept and packed at every budget, and why some cannot meet one.

    Where the tokens stand costs nothing: both arms of a pair have the same settings otherwise. A method that keeps nothing
    has no share to fit and stands as it is, with no budget.

    Raises:
        InputError: a method without a setting ``positions``, or of an unknown name.
    """
    arms, refused = [Arm(UNPRUNED)], []
    for text in texts:
        kept, packed = both(text)
        for budget in (None,) if isinstance(kept, VTW) else budgets:
            try:
                arm = fit_arm(f"{text} {KEEP}", kept, budget, prompt)
            except InputError as error:
                refused.append(str(error))
                continue
            assert arm.policy is not None
            other = replace(arm.policy, positions=packed.positions)  # type: ignore[call-arg]
            arms += [arm, Arm(f"{text} {PACK}", budget, other)]
    return arms, refused


def both(text: str) -> tuple[PruningPolicy, PruningPolicy]:
    """A method with its positions kept, and packed."""
    policy = policy_from(text)
    if "positions" not in policy.__dataclass_fields__:
        raise InputError(f"methods: expected some with a setting 'positions', got {text!r}")
    return replace(policy, positions=KEEP), replace(policy, positions=PACK)  # type: ignore[call-arg]
