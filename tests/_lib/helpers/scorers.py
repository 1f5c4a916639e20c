"""Small scorers: one of any width, whose scores are easy to tell, and one that has learned nothing."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlmprune.policies import GlanceScorer, Needs, Scorer, TokenContext


class Slope(Scorer):
    """The first ``terms`` entries of a row times a weight; reads no text, and works at any width and layer."""

    needs = Needs(hidden=True)
    growth = "n"

    def __init__(self, terms: int = 3) -> None:
        super().__init__()
        self.terms = terms
        self.weight = nn.Parameter(torch.linspace(1.0, -2.0, terms))

    def forward(self, ctx: TokenContext) -> Tensor:
        return ctx.hidden[..., : self.terms].to(self.dtype) @ self.weight


def glance(width: int, layer: int = 0, seed: int = 0) -> GlanceScorer:
    """One that has learned nothing, always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GlanceScorer(width, layer, heads=2, size=4).eval()


SLOPE = Slope().eval()
