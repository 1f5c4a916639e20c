"""What is compared at every budget: Scout and its ablations, every published method at its best footing, and the baselines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from vlmprune import Random, Uniform, policy_from
from vlmprune.errors import InputError
from vlmprune.eval.arms import ORACLE, SMALLER, UNPRUNED, Arm, PromptSize, fit_arm, make_arms
from vlmprune.eval.oracle import Oracle
from vlmprune.policies.base import PruningPolicy

PAPER_DEPTH = 32
LATTICE, RANDOM = "lattice", "random"
KEPT, PACKED = "keep", "pack"
BEFORE = ("visionzip", "divprune", "cdpruner", "vispruner")
"""Methods that choose ahead of the language model, at their own defaults."""


def published(depth: int) -> dict[str, PruningPolicy]:
    """The published methods by their name in the tables, once for each place of what they keep.

    Those inside the language model have the paper's layers, scaled from 32 to ``depth``, and a second time ("early") the
    first ones they can have, as no method that leaves a quarter of the layers whole can save more than three quarters.
    FEATHER's second stage is one layer later than the paper's, where it does better here (``studies/feather``).
    """
    one, two, four, six = (max(1, depth * k // PAPER_DEPTH) for k in (4, 8, 16, 24))
    inside = {
        "FastV": f"fastv:layer={two}",
        "FastV, early": "fastv:layer=1",
        "FEATHER": f"feather:layers={two}/{four + 1}",
        "FEATHER, early": f"feather:layers=1/{two + 1}",
        "PyramidDrop": f"pyramiddrop:layers={two}/{four}/{six}",
        "PyramidDrop, early": f"pyramiddrop:layers=1/{two}/{four}",
        "SparseVLM": f"sparsevlm:layers={one}/{two}/{four},keep=0.5/0.5/0.5",
        "VScan": f"vscan:layer={four},shallow_layer=1",
    }
    methods = {name: policy_from(text) for name, text in inside.items()}
    methods |= {type(policy).__name__: policy for policy in map(policy_from, BEFORE)}
    methods["CDPruner, diversity alone"] = policy_from("cdpruner:relevance=none")
    return {name: policy for method, it in methods.items() for name, policy in placed(method, it).items()}


def placed(name: str, policy: PruningPolicy) -> dict[str, PruningPolicy]:
    """A method with its positions kept and packed, where it can do both; else as it is."""
    if "positions" not in policy.__dataclass_fields__:
        return {name: policy}
    return {f"{name}, {where}": replace(policy, positions=where) for where in (KEPT, PACKED)}  # type: ignore[call-arg]


def study_arms(
    scouts: dict[str, PruningPolicy],
    budgets: Sequence[float],
    prompt: PromptSize,
    draws: int,
    only: Sequence[str] = (),
) -> tuple[list[Arm], list[str]]:
    """The unpruned model, then each method at each budget that it can meet; and why it cannot meet the others.

    Args:
        scouts: ours, by their names in the tables.
        budgets: FLOPs cuts.
        prompt: what they are counted for.
        draws: of those that draw.
        only: beginnings of the names of methods to ask; empty: all.

    Raises:
        InputError: no method begins so.
    """
    methods: dict[str, PruningPolicy | None] = {
        **scouts,
        LATTICE: Uniform(layer=0),
        RANDOM: Random(layer=0),
        SMALLER: None,
        **published(prompt.shape.layers),
        ORACLE: Oracle(layer=0),
    }
    wanted = [name for name in methods if not only or name.startswith(tuple(only))]
    if not wanted:
        raise InputError(f"only: expected beginnings of {', '.join(methods)}, got {', '.join(only)}")
    arms, refused = [Arm(UNPRUNED)], []
    for name in wanted:
        for budget in budgets:
            try:
                arm = _fitted(name, methods[name], budget, prompt)
            except InputError as error:
                refused.append(str(error))
                continue
            arms += [replace(arm, seed=seed) for seed in range(draws if RANDOM in name else 1)]
    return arms, refused


def _fitted(name: str, policy: PruningPolicy | None, budget: float, prompt: PromptSize) -> Arm:
    """A method at a budget; None stands for pictures made smaller."""
    if policy is None:
        return make_arms({}, [budget], [SMALLER], 1, prompt)[-1]
    return fit_arm(name, policy, budget, prompt)
