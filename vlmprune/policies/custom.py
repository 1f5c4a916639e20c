"""Any function as a policy: the caller chooses, we check what came back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn, Self

from torch import Tensor

from vlmprune.errors import InputError, check
from vlmprune.policies.answer import check_index
from vlmprune.policies.base import Needs, PruningPolicy, TokenContext
from vlmprune.policies.checks import check_layer

Select = Callable[[TokenContext], Tensor]


@dataclass(frozen=True)
class Checked:
    """A function whose every answer is checked, without columns that are padding in every sample."""

    function: Select

    def __call__(self, ctx: TokenContext) -> Tensor:
        index = self.function(ctx)
        return index[:, : check_index(index, ctx, "select(ctx)")]

    def __repr__(self) -> str:
        return getattr(self.function, "__qualname__", None) or repr(self.function)


@dataclass(frozen=True)
class Custom(PruningPolicy):
    """Keeps what a function says. Lets any other library or experiment plug in.

    The function sees the layout of the tokens and, at layer 1 or later, their hidden states and the last query row
    and keys of the previous layer. Its answer is checked in full, which costs one host read.

    Args:
        layer: layers 0..layer-1 see every token, ``layer`` and later only the kept ones.
        select: takes a TokenContext, returns ``[B, K]`` int64: which of the entering tokens stay, as numbers in
            0..count-1 of each sample, ascending, -1 padding on the right, at least one where a sample has any.
        earlier_kv, rectify: as for every policy.

    Raises:
        InputError: ``layer`` is out of range, ``select`` is no callable or what it returned is not as above.
    """

    summary = "a function of yours"

    layer: int
    # The field is the method: every policy is asked by ``select(ctx)``, and this one's comes with the instance.
    select: Select = None  # type: ignore[assignment]  # required: None is refused

    def __post_init__(self) -> None:
        check_layer(self.layer)
        check(callable(self.select), "select", "a callable that takes a TokenContext", repr(self.select))
        if not isinstance(self.select, Checked):
            object.__setattr__(self, "select", Checked(self.select))

    fixed_count = False

    def needs(self, layer: int) -> Needs:
        """Everything: what the function reads is not known. Before layer 0 there is no attention to see."""
        return Needs(hidden=True, attention="previous" if layer > 0 else None)

    def at(self, share: float) -> Self:
        """Raise InputError: a function has no share to set."""
        self._unknown("a policy with a share to set")

    def kept(self, tokens: int, images: float, layer: int) -> int:
        """Raise InputError: what a function keeps is known when it has chosen."""
        self._unknown("a policy that says how many tokens it keeps")

    def _unknown(self, expected: str) -> NoReturn:
        raise InputError(f"Custom: expected {expected}, got the function {self.select!r}")
