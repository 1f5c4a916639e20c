"""How many tokens stay by the rank of the attention that the text raters pay to them (SparseVLM's paper and first release)."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmprune.errors import check
from vlmprune.policies.base import TokenContext
from vlmprune.policies.parts.raters import rater_weights, row_attention

RANKS = {192: (13.5, 0.0), 128: (9.0, 6.0), 64: (0.8, 0.0)}
"""Scale and bias of the released budgets."""


def line_of(
    version: str, tokens: int, keep: tuple[float, ...], scale: float | None, bias: float | None
) -> tuple[float | None, float | None]:
    """Scale and bias of a version that counts by rank, where they are None the budget's, or the paper's 1 and 0.

    Raises:
        InputError: no numbers, a budget that has none, a scale that is not above 0, a schedule ``keep`` beside them; or
            numbers for version "1.5", which has a schedule.
    """
    for name, number in (("scale", scale), ("bias", bias)):
        check(number is None or isinstance(number, int | float), name, "a number or None", repr(number))
    if version == "1.5":
        no_rank = scale is None and bias is None
        check(no_rank, "scale", "None, and no bias, for version '1.5'", f"{scale} and {bias}")
        return None, None
    check(keep == (), "keep", f"() for version {version!r}, which counts by rank", keep)
    usual, shift = (1.0, 0.0) if version == "paper" else RANKS.get(tokens, (None, 0.0))
    scale = usual if scale is None else float(scale)
    check(scale is not None, "tokens", "192, 128 or 64, or a scale, for version '1.0'", tokens)
    check(scale is not None and scale > 0, "scale", "a number > 0", scale)
    return scale, shift if bias is None else float(bias)


def by_rank(ctx: TokenContext, scale: float | None, bias: float | None, version: str) -> list[int]:
    """How many of each sample's n tokens stay, one at least; one host sync.

    "1.0": ``int(rank * scale + bias)``, at most n - 1; n where that is the rank. "paper": ``n - int(scale * (n - rank))``.
    """
    assert scale is not None and bias is not None
    kept: list[int] = []
    for n, rank in zip(ctx.counts, attention_ranks(ctx, rater_weights(ctx)), strict=True):
        if version == "paper":
            wanted = n - int(scale * (n - rank))
        else:
            wanted = n if rank >= n else min(int(rank * scale + bias), n - 1)
        kept.append(min(n, max(1, wanted)))
    return kept


def attention_ranks(ctx: TokenContext, weights: Tensor) -> list[int]:
    """Rank of each sample's head-mean attention ``[raters, visual tokens]``; its tokens if it has none or a NaN. Host sync."""
    seen = ctx.given("attention")
    shares = seen.across_ranks(row_attention(seen).mean(1), "mean") * weights[..., None]
    # matrix_rank's own default, for the matrix without the rows and columns that are padding or no raters
    tokens = ctx.mask.sum(1)
    tolerance = torch.maximum(weights.sum(1), tokens.float()) * torch.finfo(torch.float32).eps
    finite = shares.isfinite().all(2).all(1)
    ranks = torch.linalg.matrix_rank(shares.where(finite[:, None, None], 0.0), rtol=tolerance)
    known: list[int] = torch.where(finite & weights.any(1), ranks, tokens).tolist()
    return known
