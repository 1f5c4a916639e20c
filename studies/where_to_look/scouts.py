"""Scout as it takes part: over three kinds of coarse tokens, and with one thing changed at a time."""

from __future__ import annotations

from dataclasses import replace

from vlmprune import DivPrune, Scout, Uniform
from vlmprune.policies.base import PruningPolicy

LOOK = 6 / 8
"""A layer behind the one where the last row's attention comes to depend on the question in glyphworld, as a share of the depth."""
LATTICE, DIVERSE = Uniform(layer=0, keep=0.12), DivPrune(keep=0.12, positions="keep")
FINE = 0.08
"""Coarse and fine tokens are as 3 to 2; budgets scale both."""
ABLATED = "of which"


def scouts(depth: int) -> dict[str, PruningPolicy]:
    """Scout by its name in the tables, for a decoder of so many layers: what it can be, then what it would be without."""
    look = round(depth * LOOK)
    lattice = Scout(coarse=LATTICE, fine=FINE, look=look)
    diverse = replace(lattice, coarse=DIVERSE)
    both = replace(lattice, coarse=replace(DIVERSE, keep=0.08) | replace(LATTICE, keep=0.04))
    ours: dict[str, PruningPolicy] = {
        "Scout, lattice": lattice,
        "Scout, diverse": diverse,
        "Scout, both": both,
    }
    ours |= {f"{ABLATED} {name}": policy for name, policy in ablations(diverse, depth).items()}
    ours[f"{ABLATED} lattice, random fine"] = replace(lattice, by="random")
    ours[f"{ABLATED} lattice, attention alone"] = replace(lattice, by="attention")
    return ours


def ablations(scout: Scout, depth: int) -> dict[str, PruningPolicy]:
    """``scout`` with one thing changed."""
    coarse = scout.coarse
    others = [scout.look - 2, scout.look - 1, scout.look + 1]
    return {
        "diverse, random fine": replace(scout, by="random"),
        "diverse, attention alone": replace(scout, by="attention"),
        "diverse, without RoPE": replace(scout, rope=False),
        **{f"diverse, look {at}": replace(scout, look=at) for at in others if 0 < at < depth},
        **{
            f"diverse, c : f = {c} : {20 - c}": replace(scout, coarse=coarse.at(c / 100), fine=(20 - c) / 100)
            for c in (4, 8, 16)
        },
    }
