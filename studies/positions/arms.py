"""Every method that could pack positions when this was measured, twice at each budget: with them kept, and with them packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from common.methods import KEEP, PACK, TOWER, placed, scaled, that_fit

from vlmprune import policy_from
from vlmprune.errors import InputError, check
from vlmprune.eval.arms import UNPRUNED, Arm, PromptSize, fit_arm
from vlmprune.policies import VTW


def methods(depth: int, tower: int) -> tuple[list[str], list[str]]:
    """The methods as typed, those of before the language model first; and why so shallow a model has no room for others.

    The papers' layers are scaled to a decoder of ``depth`` layers and a vision tower of ``tower``.

    One that begins at a quarter of the layers cannot save 83 %: it stands here a second time, beginning at layer 1.
    """
    one, two, four, six = (scaled(layer, depth) for layer in (4, 8, 16, 24))
    texts = [
        "divprune",
        "cdpruner",
        "vispruner",
        "fastervlm",
        "visionzip",
        "accm_selection",
        "folder",
        f"vscan:layer={four},shallow_layer={scaled(5, tower, TOWER)}",
        f"aim:layer={four},stages={two}",
        f"pyramiddrop:layers={two}/{four}/{six}",
        f"pyramiddrop:layers=1/{two}/{four}",
        f"sparsevlm:layers={one}/{two}/{four},keep=0.5/0.5/0.5",
        f"ficoco:layers={'/'.join(map(str, range(max(2, scaled(6, depth)), depth)))}",
        f"ficoco:layers={'/'.join(map(str, range(1, max(2, two) + 1)))}",
        f"vtw:layer={two}",
        f"vtw:layer={four}",
    ]
    fit, left_out = that_fit({text: text for text in texts}, depth)
    return list(fit), left_out


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
        places = placed(policy_from(text))
        check(bool(places), "methods", "some with a setting 'positions'", repr(text))
        kept, packed = places[KEEP], places[PACK]
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
