"""FEATHER's criteria one by one, and the arms of the study: methods at equal FLOPs, and the same criteria layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from common.methods import scaled
from torch import Tensor

from vlmprune.errors import InputError
from vlmprune.eval.arms import Arm, PromptSize, cut_of, draws_of, fit_arm, make_arms
from vlmprune.eval.oracle import Oracle
from vlmprune.policies import FastV, Feather, PyramidDrop, Random, Uniform
from vlmprune.policies.base import Needs, PruningPolicy, TokenContext
from vlmprune.policies.checks import BEFORE, check_keep, check_layer, check_whole
from vlmprune.policies.choose import index_of, marks, select_scores
from vlmprune.policies.counts import union_count
from vlmprune.policies.parts.lattice import grid_count, stride_grid

STRIDE = 3
SWEEP_KEEP = 0.25
"""FEATHER's table of criteria keeps a quarter (R = 0.75)."""


@dataclass(frozen=True)
class RopeFree(PruningPolicy):
    """One stage of FEATHER's score, phi_-R: the last row's attention without RoPE, softmax over the visual tokens.

    ``Feather`` has two stages and always the grid. This is its criterion alone, or, with ``stride``, the first stage
    alone: the best ``int(n * keep)`` tokens joined by the grid.
    """

    layer: int = 2
    keep: float = 0.25
    stride: int | None = None

    def __post_init__(self) -> None:
        check_layer(self.layer, 1, BEFORE)
        check_keep(self.keep)
        if self.stride is not None:
            check_whole("stride", self.stride, 1)

    @property
    def layers(self) -> tuple[int, ...]:
        return (self.layer,)

    def needs(self, layer: int) -> Needs:
        return Needs(attention="previous")

    def select(self, ctx: TokenContext) -> Tensor:
        seen = ctx.given("attention").chunk()
        best = select_scores(seen.received(seen.last, normalize="columns", unrotated=True), ctx, self.keep)
        if self.stride is None:
            return best
        return index_of(marks(best, ctx.mask.shape[1]) | stride_grid(ctx, self.stride))

    def kept(self, tokens: int, images: float, layer: int) -> int:
        best = super().kept(tokens, images, layer)
        if self.stride is None:
            return best
        return union_count(best, grid_count(tokens, images, self.stride), tokens)


def budget_arms(prompt: PromptSize, budgets: Sequence[float], draws: int) -> tuple[list[Arm], list[str]]:
    """The unpruned model and every method at every budget; and what cannot meet one, with the reason.

    FEATHER's stages 8 and 16 and PyramidDrop's 8, 16 and 24 are scaled from 32 layers to the decoder's; all other methods
    act at the layer of FEATHER's first stage. FastV also acts at the paper's layer 3, scaled; and FEATHER's second stage
    also one layer later, as it scores from the layer before, PyramidDrop from its own. Evenly spaced tokens are a lattice,
    also around what the oracle is told; the paper's, in raster order, are a method of their own.
    """
    depth = prompt.shape.layers
    first, second, third = (scaled(layer, depth) for layer in (8, 16, 24))
    methods = {
        f"fastv:layer={scaled(3, depth)}": FastV(layer=scaled(3, depth)),
        f"fastv:layer={first}": FastV(layer=first),
        f"rope-free:layer={first}": RopeFree(layer=first),
        f"rope-free+grid:layer={first}": RopeFree(layer=first, stride=STRIDE),
        f"feather:layers={first}/{second}": Feather(layers=(first, second), stride=STRIDE),
        f"feather:layers={first}/{second + 1}": Feather(layers=(first, second + 1), stride=STRIDE),
        f"pyramiddrop:layers={first}/{second}/{third},positions=pack": PyramidDrop(
            layers=(first, second, third), positions="pack"
        ),
        f"pyramiddrop:layers={first}/{second}/{third},positions=keep": PyramidDrop(
            layers=(first, second, third), positions="keep"
        ),
        f"uniform:layer={first}": Uniform(layer=first),
        f"uniform:layer={first},order=raster": Uniform(layer=first, order="raster"),
        f"random:layer={first}": Random(layer=first),
        f"oracle:layer={first}": Oracle(layer=first),
    }
    arms, refused = make_arms({}, [], (), draws, prompt), []
    for text, policy in methods.items():
        for budget in budgets:
            try:
                arm = fit_arm(text, policy, budget, prompt)
            except InputError as error:
                refused.append(str(error))
                continue
            arms += draws_of(arm, draws)
    return arms, refused


def sweep_arms(prompt: PromptSize, layers: Sequence[int]) -> list[Arm]:
    """The criteria in one stage at each of these layers, all at the FLOPs of uniform tokens, a quarter, at that layer."""
    arms = []
    for layer in layers:
        quarter = Arm("", None, Uniform(layer=layer, keep=SWEEP_KEEP))
        cut = round(cut_of(quarter, prompt) - 1e-6, 6)  # rounded down: the quarter itself must meet it
        methods = {
            "fastv": FastV(layer=layer),
            "rope-free": RopeFree(layer=layer),
            "rope-free+grid": RopeFree(layer=layer, stride=STRIDE),
            "uniform": Uniform(layer=layer),
            "oracle": Oracle(layer=layer),
        }
        arms += [fit_arm(name, policy, cut, prompt) for name, policy in methods.items()]
    return arms
