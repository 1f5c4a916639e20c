"""Any function as a policy: the caller chooses, we check what came back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vlmprune.errors import check
from vlmprune.policies.base import Needs, PruningPolicy, TokenContext, check_layer

Select = Callable[[TokenContext], Tensor]

NAME = "select(ctx)"


@dataclass(frozen=True, init=False, repr=False)
class Custom(PruningPolicy):
    """Keeps what a function says. Lets any other library or experiment plug in.

    The function sees the layout of the tokens and, at layer 1 or later, their hidden states and the last query row
    and keys of the previous layer. Its answer is checked in full, which costs one host read.

    Args:
        layer: layers 0..layer-1 see every token, ``layer`` and later only the kept ones.
        select: takes a TokenContext, returns ``[B, K]`` int64: which of the entering tokens stay, as numbers in
            0..count-1 of each sample, ascending, -1 padding on the right, at least one where a sample has any.
        earlier_kv: as for every policy.

    Raises:
        ValueError: ``layer`` is out of range, ``select`` is no callable or what it returned is not as above.
    """

    summary: ClassVar[str] = "a function of yours"

    layer: int
    function: Select

    def __init__(
        self, layer: int, select: Select, *, earlier_kv: Literal["full", "compact"] = "full"
    ) -> None:
        check_layer(layer)
        check(callable(select), "select", "a callable that takes a TokenContext", repr(select))
        object.__setattr__(self, "layer", layer)
        object.__setattr__(self, "function", select)
        object.__setattr__(self, "earlier_kv", earlier_kv)

    def __repr__(self) -> str:
        name = getattr(self.function, "__qualname__", None) or repr(self.function)
        return f"Custom(layer={self.layer}, select={name})"

    @property
    def layers(self) -> tuple[int, ...]:
        """The one stage."""
        return (self.layer,)

    def needs(self, layer: int) -> Needs:
        """Everything: what the function reads is not known. Before layer 0 there is no attention to see."""
        return Needs(hidden=True, attention="previous" if layer > 0 else None)

    def select(self, ctx: TokenContext) -> Tensor:
        """What the function chose, checked, without columns that are padding in every sample."""
        index = self.function(ctx)
        return index[:, : check_index(index, ctx)]


def check_index(index: object, ctx: TokenContext) -> int:
    """Return how many columns of ``index`` the fullest sample uses; raise ValueError unless it is a valid choice."""
    if not isinstance(index, Tensor):
        raise ValueError(f"{NAME}: expected a tensor, got {type(index).__name__}")
    check(index.dtype == torch.int64, NAME, "int64", index.dtype)
    shape = tuple(index.shape)
    check(len(shape) == 2 and shape[0] == len(ctx.counts), NAME, f"[{len(ctx.counts)}, K]", list(shape))
    check(index.device == ctx.mask.device, NAME, f"a tensor on {ctx.mask.device}", index.device)
    rows = index.tolist()
    for sample, (row, tokens) in enumerate(zip(rows, ctx.counts, strict=True)):
        _check_row(row, tokens, f"{NAME}[{sample}]")
    return max(sum(i >= 0 for i in row) for row in rows)


def _check_row(row: list[int], tokens: int, name: str) -> None:
    kept = [i for i in row if i != -1]
    check(row == kept + [-1] * (len(row) - len(kept)), name, "-1 only on the right", row)
    outside = [i for i in kept if not 0 <= i < tokens]
    check(not outside, name, f"numbers below {tokens}, this sample's tokens, or -1", outside[:1])
    falls = [(a, b) for a, b in pairwise(kept) if a >= b]
    check(not falls, name, "ascending numbers, each once", falls[:1])
    check(bool(kept) or tokens == 0, name, f"at least one of this sample's {tokens} tokens", "none")
