"""One question to a policy, and what its answer is held to."""

from __future__ import annotations

from types import TracebackType

import torch
from torch import Tensor

from vlmprune.errors import check
from vlmprune.policies.answer import check_selection
from vlmprune.policies.base import PruningPolicy, Reduction, TokenContext
from vlmprune.testing.context_changes import copied, inputs_of

Choice = Tensor | Reduction


class Noted:
    """Adds a note to whatever is raised in its block."""

    def __init__(self, note: str) -> None:
        self.note = note

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            error.add_note(self.note)


def ask(policy: PruningPolicy, ctx: TokenContext, case: str) -> Choice:
    """A valid choice. Raises InputError for another one, and if the policy writes into its context."""
    own = copied(ctx)
    with Noted(
        f"{case}: {policy!r}.select(ctx) with {policy.needs(ctx.layer)}; what is not declared is None"
    ):
        choice = policy.select(own)
    for name, x in tensors_of(own).items():
        same = torch.equal(x.nan_to_num(), tensors_of(ctx)[name].nan_to_num())
        check(same, f"{case}: {policy!r}.select(ctx)", f"ctx.{name} as it was", "other values written to it")
    check_selection(choice, own, f"{case}: {policy!r}")
    assert isinstance(choice, Tensor | Reduction)
    return choice


def tensors_of(ctx: TokenContext) -> dict[str, Tensor]:
    """Everything a policy could write to."""
    return inputs_of(ctx) | {"mask": ctx.mask, "ordinals": ctx.ordinals, "positions": ctx.positions}


def ask_twice(policy: PruningPolicy, ctx: TokenContext, case: str) -> Choice:
    """A valid choice, the same as when asked again."""
    first, again = ask(policy, ctx, case), ask(policy, ctx, case)
    for sample in range(len(ctx.counts)):
        expect_same(again, first, sample, f"{case}: {policy!r}.select(ctx), asked again", "what it was")
    return first


def expect_same(choice: Choice, other: Choice, sample: int, who: str, expected: str) -> None:
    """Raise InputError unless a sample has the same tokens and rows in both choices."""
    (kept, rows), (wanted, wanted_rows) = chosen(choice, sample), chosen(other, sample)
    check(kept == wanted, f"{who}, sample {sample}", f"{expected}, {wanted}", kept)
    if rows is not None and wanted_rows is not None:
        close = torch.allclose(rows.float(), wanted_rows.float(), rtol=1e-4, atol=1e-5, equal_nan=True)
        check(close, f"{who}, sample {sample}", f"{expected}, with the same rows", "other rows")


def chosen(choice: Choice, sample: int) -> tuple[list[int], Tensor | None]:
    """One sample's kept numbers without padding, and its new rows."""
    index = choice.index if isinstance(choice, Reduction) else choice
    kept = [i for i in index[sample].tolist() if i >= 0]
    rows = choice.hidden if isinstance(choice, Reduction) else None
    return kept, None if rows is None else rows[sample, : len(kept)]


def expect_all(policy: PruningPolicy, ctx: TokenContext, case: str) -> None:
    """Raise InputError unless every token stays."""
    choice = ask(policy, ctx, case)
    for sample, tokens in enumerate(ctx.counts):
        kept = sorted(chosen(choice, sample)[0])
        who = f"{case}: {policy!r}.select(ctx), sample {sample}"
        check(kept == list(range(tokens)), who, f"all {tokens} tokens", kept)
