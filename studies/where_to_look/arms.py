"""What is compared at every budget: Scout and its ablations, published methods with positions kept and packed, and the baselines."""

from __future__ import annotations

from collections.abc import Sequence

from common.methods import TOWER, placed, scaled, that_fit

from vlmprune import Random, Uniform
from vlmprune.errors import InputError
from vlmprune.eval.arms import ORACLE, SMALLER, UNPRUNED, Arm, PromptSize, draws_of, fit_arm, make_arms
from vlmprune.eval.oracle import Oracle
from vlmprune.policies.base import PruningPolicy

LATTICE, RANDOM = "lattice", "random"
BEFORE = {
    "VisionZip": "visionzip",
    "DivPrune": "divprune",
    "CDPruner": "cdpruner",
    "CDPruner, diversity alone": "cdpruner:relevance=none",
    "VisPruner": "vispruner",
    "FasterVLM": "fastervlm",
}
"""Methods that choose ahead of the language model, at their own defaults."""
LATER = {
    "HoloV": "holov",
    "HiPrune": "hiprune:object_layer={eight}",
    "PruMerge": "prumerge",
    "PruMerge+": "prumerge:plus=true",
    "TRIM": "trim",
    "ToMe": "tome",
    "SCOPE": "scope",
    "MMTok": "mmtok",
    "PruneSID": "prunesid",
    "ZOO-Prune": "zoo_prune:directions=16",
    "AgilePruner": "agilepruner",
    "FlowCut": "flowcut:vision_layers={all}",
    "VisionTrim": "visiontrim",
    "V2Drop, early": "v2drop:layers=1/2/3,keep=0.5/0.5/0.5",
    "PriorTR, early": "priortr:layer=1",
    "FitPrune, early": "fitprune:layers=1/2/3,drop=0.5",
    "MustDrop, early": "mustdrop:layers=1/2/3,keep=0.5",
}
"""Methods that came later, with positions kept: asked where ``--only`` names them. Those that need tiles are not here."""


def published(depth: int, tower: int) -> tuple[dict[str, PruningPolicy], list[str]]:
    """Published methods by their name in the tables, once for each place of what they keep; and for which there is no room.

    Those inside the language model have the paper's layers, scaled to ``depth`` and ``tower``, and a second time ("early") the
    first ones they can have, as no method that leaves a quarter of the layers whole can save more than three quarters.
    FEATHER's second stage is one layer later than the paper's, where it does better here (``studies/feather``).
    """
    one, two, four, six = (scaled(layer, depth) for layer in (4, 8, 16, 24))
    inside = {
        "FastV": f"fastv:layer={two}",
        "FastV, early": "fastv:layer=1",
        "FEATHER": f"feather:layers={two}/{four + 1}",
        "FEATHER, early": f"feather:layers=1/{two + 1}",
        "PyramidDrop": f"pyramiddrop:layers={two}/{four}/{six}",
        "PyramidDrop, early": f"pyramiddrop:layers=1/{two}/{four}",
        "SparseVLM": f"sparsevlm:layers={one}/{two}/{four},keep=0.5/0.5/0.5",
        "SparseVLM+": f"sparsevlm_plus:layers={one}/{two}/{four},keep=0.5/0.5/0.5",
        "DART": f"dart:layer={two},count=exact",
        "DART, early": "dart:layer=1,count=exact",
        "AIM": f"aim:layer={four},stages={two}",
        "VScan": f"vscan:layer={four},shallow_layer={scaled(5, tower, TOWER)}",
    }
    methods, left_out = that_fit(inside | BEFORE, depth)
    out: dict[str, PruningPolicy] = {}
    for name, policy in methods.items():
        out |= {f"{name}, {where}": it for where, it in placed(policy).items()} or {name: policy}
    return out, left_out


def later(depth: int, tower: int) -> dict[str, PruningPolicy]:
    """Methods that came later, as far as ``depth`` has room for them."""
    layers = {"eight": scaled(8, tower, TOWER), "all": "/".join(map(str, range(tower)))}
    return that_fit({name: text.format(**layers) for name, text in LATER.items()}, depth)[0]


def study_arms(
    scouts: dict[str, PruningPolicy],
    budgets: Sequence[float],
    prompt: PromptSize,
    tower: int,
    draws: int,
    only: Sequence[str] = (),
) -> tuple[list[Arm], list[str]]:
    """The unpruned model, then each method at each budget that it can meet; and why it cannot meet the others.

    Args:
        scouts: ours, by their names in the tables.
        budgets: FLOPs cuts.
        prompt: what they are counted for.
        tower: layers of the vision tower.
        draws: of those that draw.
        only: beginnings of the names of methods to ask; empty: all but those that came later.

    Raises:
        InputError: no method begins so.
    """
    theirs, refused = published(prompt.shape.layers, tower)
    baselines = {LATTICE: Uniform(layer=0), RANDOM: Random(layer=0), SMALLER: None}
    methods = scouts | baselines | theirs | {ORACLE: Oracle(layer=0)}
    if only:
        methods |= later(prompt.shape.layers, tower)
    wanted = [name for name in methods if not only or name.startswith(tuple(only))]
    if not wanted:
        raise InputError(f"only: expected beginnings of {', '.join(methods)}, got {', '.join(only)}")
    arms = [Arm(UNPRUNED)]
    for name in wanted:
        for budget in budgets:
            try:
                arms += draws_of(_fitted(name, methods[name], budget, prompt), draws)
            except InputError as error:
                refused.append(str(error))
    return arms, refused


def _fitted(name: str, policy: PruningPolicy | None, budget: float, prompt: PromptSize) -> Arm:
    """A method at a budget; None stands for pictures made smaller."""
    if policy is None:
        return make_arms({}, [budget], [SMALLER], 1, prompt)[-1]
    return fit_arm(name, policy, budget, prompt)
