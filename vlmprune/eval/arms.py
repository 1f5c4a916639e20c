"""What is compared: every policy at every budget, the baselines at the same budgets, and the unpruned model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from vlmprune.errors import InputError, nearest
from vlmprune.eval.oracle import Oracle
from vlmprune.eval.questions import Region
from vlmprune.flops import DecoderShape, Wave, decoder_flops, mean_tokens, prefill_flops, visual_inputs
from vlmprune.policies.base import PruningPolicy
from vlmprune.policies.methods.random import Random
from vlmprune.policies.methods.uniform import Uniform
from vlmprune.policies.schedule import keep_for_flops, stage_counts, wave_rows
from vlmprune.smaller import NAME as SMALLER
from vlmprune.smaller import Smaller

UNPRUNED = "unpruned"
BASELINES = ("lattice", "raster", "random", SMALLER)
"""Evenly spaced tokens in two dimensions and in raster order, random ones, and the picture made smaller."""
ORACLE = "oracle"


@dataclass(frozen=True)
class PromptSize:
    """What the cost of a prompt depends on: the decoder's dimensions, and its visual and text tokens."""

    shape: DecoderShape
    visual: int
    text: int


@dataclass(frozen=True)
class Arm:
    """One way to answer every question.

    Attributes:
        method: the policy as typed, a baseline's name, or "unpruned".
        budget: the FLOPs cut it was fitted to, or None.
        policy: what prunes, or None.
        seed: which of several draws, for policies that draw.
        smaller: how small the pictures are instead, or None.
    """

    method: str
    budget: float | None = None
    policy: PruningPolicy | None = None
    seed: int = 0
    smaller: Smaller | None = None

    @property
    def key(self) -> str:
        """What it does with all its settings, but for the seed and what an oracle is told."""
        does = self.smaller or self.policy
        return UNPRUNED if does is None else repr(does)

    def for_batch(self, number: int, regions: Sequence[Region | None]) -> PruningPolicy | None:
        """The policy for batch ``number``, whose answers are seen in these regions.

        Each batch draws anew, or every question would see one same draw; an oracle is told the regions.
        """
        if isinstance(self.policy, Oracle):
            return dataclasses.replace(self.policy, regions=tuple(regions))
        return None if self.policy is None else _seeded(self.policy, self.seed * 1_000_003 + number)


def groups_of(arms: Sequence[Arm]) -> dict[tuple[str, float | None], list[Arm]]:
    """The draws of each method at each budget."""
    groups: dict[tuple[str, float | None], list[Arm]] = {}
    for arm in arms:
        groups.setdefault((arm.method, arm.budget), []).append(arm)
    return groups


def make_arms(
    methods: Mapping[str, PruningPolicy],
    budgets: Sequence[float],
    baselines: Sequence[str],
    seeds: int,
    prompt: PromptSize,
    left_out: list[str] | None = None,
) -> list[Arm]:
    """All arms, the unpruned one first. Without budgets the policies are taken as they are, and the baselines are
    fitted to each policy's own cut. A baseline that prunes acts at the first layer of any policy; one that is given is not added.

    ``left_out`` takes why a baseline cannot meet the cut of a policy, as where that keeps nothing; None: an error.

    Raises:
        InputError: a policy that has no share to fit, or that cannot meet a budget; an unknown baseline.
    """
    arms = [
        fit_arm(text, policy, cut, prompt) for text, policy in methods.items() for cut in budgets or (None,)
    ]
    # a hair less, as a hair more would cost a baseline a token
    cuts = budgets or sorted({round(cut_of(arm, prompt) - 1e-6, 6) for arm in arms if baselines})
    first = min((policy.layers[0] for policy in methods.values()), default=2)
    for name in baselines:
        fit: Callable[..., Arm] = partial(_smaller, prompt=prompt)
        if name != SMALLER:
            text, baseline = _baseline(name, first)
            if any(_same_method(policy, baseline) for policy in methods.values()):
                continue
            fit = partial(fit_arm, text, baseline, prompt=prompt)
        for cut in cuts:
            try:
                arms.append(fit(cut=cut))
            except InputError as error:
                if budgets or left_out is None:
                    raise
                left_out.append(str(error))
    return [Arm(UNPRUNED), *(one for arm in arms for one in draws_of(arm, seeds))]


def _baseline(name: str, layer: int) -> tuple[str, PruningPolicy]:
    """How a baseline that prunes is called in tables, and the policy."""
    known: dict[str, tuple[str, PruningPolicy]] = {
        "lattice": (f"uniform:layer={layer}", Uniform(layer=layer)),
        "raster": (f"uniform:layer={layer},order=raster", Uniform(layer=layer, order="raster")),
        "random": (f"random:layer={layer}", Random(layer=layer)),
        ORACLE: (f"oracle:layer={layer}", Oracle(layer=layer)),
    }
    if name not in known:
        raise InputError(
            f"baselines: expected some of {', '.join(BASELINES)}, got {name!r}{nearest(name, BASELINES)}"
        )
    return known[name]


def _same_method(policy: PruningPolicy, baseline: PruningPolicy) -> bool:
    if isinstance(policy, Uniform) and isinstance(baseline, Uniform):
        return policy.order == baseline.order
    return isinstance(policy, type(baseline))


def _smaller(cut: float, prompt: PromptSize) -> Arm:
    """The largest pictures that meet a budget: all layers see as few tokens as behind a stage at the first."""
    return Arm(SMALLER, cut, smaller=Smaller(_share(SMALLER, Uniform(layer=0), cut, prompt)))


def fit_arm(text: str, policy: PruningPolicy, cut: float | None, prompt: PromptSize) -> Arm:
    """The arm of a policy, as it is or fitted to a budget. Raises InputError if it has no share, or cannot meet it."""
    if cut is None:
        return Arm(text, None, policy)
    return Arm(text, cut, policy.at(_share(text, policy, cut, prompt)))


def _share(text: str, policy: PruningPolicy, cut: float, prompt: PromptSize) -> float:
    try:
        return keep_for_flops(policy, cut, prompt.shape, prompt.visual, prompt.text)
    except InputError as error:
        raise InputError(f"{text} at budget {cut:g}: {error}") from error


def cut_of(arm: Arm, prompt: PromptSize) -> float:
    """Share of the prefill's FLOPs that an arm saves on ``prompt``."""
    assert arm.policy is not None
    return planned(arm.policy, prompt)[0]


def planned(policy: PruningPolicy, prompt: PromptSize) -> tuple[float, float]:
    """``cost`` of a policy on ``prompt`` before it has run: what its settings say that it keeps."""
    stages = stage_counts(policy, prompt.visual)
    return cost(prompt, stages, wave=wave_rows(policy, stages, prompt.text))


def cost(
    prompt: PromptSize,
    stages: Sequence[tuple[int, int]],
    joined: int = 0,
    spent: int = 0,
    wave: Wave[int] | None = None,
) -> tuple[float, float]:
    """Share of the prefill's FLOPs saved, and mean visual tokens over the layers, where ``stages`` leave ``(layer, tokens)``.

    ``joined`` rows of text join the prompt at the first of them, and ``spent`` FLOPs went into writing these; ``wave`` is a
    second wave.
    """
    shape = prompt.shape
    visual = visual_inputs(shape.layers, prompt.visual, stages, wave)
    full = decoder_flops(shape, [prompt.visual + prompt.text] * shape.layers)
    pruned = prefill_flops(shape, prompt.visual, prompt.text + joined, stages, wave)
    return 1 - (pruned + spent) / full, mean_tokens(visual)


def draws_of(arm: Arm, seeds: int) -> list[Arm]:
    """The arm once for each of ``seeds`` seeds if its policy draws, else as it is."""
    draws = arm.policy is not None and _seeded(arm.policy, 1) != arm.policy
    return [dataclasses.replace(arm, seed=seed) for seed in range(seeds)] if draws else [arm]


def _seeded(policy: PruningPolicy, seed: int) -> PruningPolicy:
    """The policy with its seed, or those of the policies it is made of, moved on by ``seed``; as it is, if none draws."""
    settings = {field.name: getattr(policy, field.name) for field in dataclasses.fields(policy) if field.init}
    moved = {name: _moved_on(name, value, seed) for name, value in settings.items()}
    changed = {name: value for name, value in moved.items() if value != settings[name]}
    return dataclasses.replace(policy, **changed) if changed else policy


def _moved_on(name: str, value: Any, seed: int) -> Any:
    """One setting of such a policy."""
    if isinstance(value, PruningPolicy):
        return _seeded(value, seed)
    if isinstance(value, tuple):
        return tuple(_moved_on("", part, seed) for part in value)
    return value + seed if name == "seed" and value is not None else value
