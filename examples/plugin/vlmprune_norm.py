"""A policy of another package: keeps the visual tokens whose hidden states have the largest norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmprune import ops
from vlmprune.policies import Needs, PruningPolicy, TokenContext, check_keep, check_layer, quotas


@dataclass(frozen=True)
class Norm(PruningPolicy):
    """Keeps the tokens with the largest L2 norm entering ``layer``. An example, not a method anyone proposed."""

    summary: ClassVar[str] = "tokens with the largest hidden states (example plugin)"
    paper: ClassVar[str] = "example"

    layer: int = 2
    keep: int | float = 0.5

    def __post_init__(self) -> None:
        check_layer(self.layer)
        check_keep(self.keep)

    @property
    def layers(self) -> tuple[int, ...]:
        """The one stage."""
        return (self.layer,)

    def needs(self, layer: int) -> Needs:
        """The hidden states of the visual tokens."""
        return Needs(hidden=True)

    def select(self, ctx: TokenContext) -> Tensor:
        """Score, then call vlmprune's selection op directly: per-sample quotas, padding coded as dropped."""
        assert ctx.hidden is not None  # asked for in needs()
        scores = ctx.hidden.float().norm(dim=-1)
        kept = quotas(ctx, self)
        quota = torch.tensor(kept).to(scores.device, non_blocking=True)
        code = torch.where(ctx.mask, 0, 2).to(torch.int8)  # 0 competes, 2 is dropped
        return ops.select_topk(scores, quota, code=code)[0][:, : max(kept)]
