"""What a scorer learns from: the context of a stage, as a policy of the same needs is shown it, of any call of the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vlmprune.errors import check
from vlmprune.models import prune
from vlmprune.policies.base import Needs, PruningPolicy, TokenContext
from vlmprune.policies.checks import check_layer


def context_of(model: nn.Module, inputs: Mapping[str, Any], needs: Needs, layer: int) -> TokenContext:
    """What a policy with these needs is shown at the stage at ``layer``; the model is frozen, and not changed.

    All layers behind the stage see one visual token of each sample, so they cost little.

    Args:
        model: any that ``prune`` takes.
        inputs: of one call of it, as its processor makes them: a batch of prompts, padded or not.
        needs: a scorer's.
        layer: of the decoder.

    Raises:
        InputError: prompts without visual tokens; whatever ``prune`` refuses.
    """
    shown = _Shown(layer, needs)
    with torch.no_grad(), prune(model, shown):
        model(**inputs, use_cache=False, logits_to_keep=1)
    check(bool(shown.seen), "inputs", "a prompt with visual tokens", "none")
    return shown.seen[0]


@dataclass(frozen=True)
class _Shown(PruningPolicy):
    """Notes its context and keeps the first token."""

    layer: int
    reads: Needs
    seen: list[TokenContext] = field(default_factory=list, init=False, compare=False)

    def __post_init__(self) -> None:
        check_layer(self.layer)
        check(isinstance(self.reads, Needs), "needs", "Needs(...)", repr(self.reads))

    def needs(self, layer: int) -> Needs:
        return self.reads

    def select(self, ctx: TokenContext) -> Tensor:
        self.seen.append(ctx)
        return torch.where(ctx.mask[:, :1], 0, -1)
