"""Pivots: a few tokens of the images and of the text behind them, each of which in turn takes what is least like it (DART)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlmprune import ops
from vlmprune.constants import whole_numbers
from vlmprune.policies.base import TokenContext
from vlmprune.policies.choose import best_among, select_counts
from vlmprune.policies.parts.set_order import set_order


def states_and_norms(ctx: TokenContext) -> tuple[Tensor, Tensor]:
    """What is compared, ``[B, N + T, D]``, and what pivots are chosen by, ``[B, N + T]`` float32: visual tokens, then text.

    Behind layer 0 what enters the stage, behind the text model's last norm, and the L1 norms of the previous layer's keys over
    the heads of all ranks; at layer 0 input embeddings, and their own L1 norms.
    """
    hidden = ctx.given("hidden")
    text = ctx.given("text_hidden")
    states = torch.cat([hidden, text], 1)
    if ctx.layer == 0:
        return states, torch.linalg.vector_norm(states, 1, dim=-1, dtype=torch.float32)
    seen = ctx.given("attention").chunk()
    strength = torch.linalg.vector_norm(seen.key, 1, dim=(1, 3), dtype=torch.float32)  # [B, S]
    strength = seen.across_ranks(strength, "sum")
    norm = ctx.given("norm")
    return norm(states), ops.gather_tokens([strength], torch.cat([seen.columns, seen.rows], 1))[0]


def largest(ctx: TokenContext, norms: Tensor, visual: Sequence[int], words: int) -> Tensor:
    """The tokens of the largest ``norms [B, N + T]``: ``[B, P]`` int64, visual tokens first, of either the larger ones first.

    Args:
        visual: how many visual tokens of each sample.
        words: how many text tokens, as far as there are. Number t is N + t; -1 = none, which come last.
    """
    text, N = ctx.given("text"), ctx.mask.shape[1]
    most = min(words, text.shape[1])
    asked = best_among(norms[:, N:], most, text >= 0)[:, :most]
    found = torch.cat([select_counts(norms[:, :N], ctx, visual), torch.where(asked >= 0, asked + N, -1)], 1)
    falling = ops.gather_tokens([norms], found)[0].argsort(dim=1, descending=True, stable=True)
    kind = torch.where(found >= 0, (found >= N).long(), 2)
    return found.gather(1, falling.gather(1, kind.gather(1, falling).argsort(dim=1, stable=True)))


def as_a_set(ctx: TokenContext, pivots: Tensor) -> Tensor:
    """The same ``[B, P]`` in the order in which CPython walks the set of their positions in the prompt, filled in theirs."""
    text = ctx.given("text")
    start = ctx.given("start")
    at = torch.cat([ctx.positions, text], 1) - start
    return pivots.gather(1, set_order(torch.where(pivots >= 0, at.gather(1, pivots.clamp(min=0)), -1)))


def taken_by(pivots: Tensor, states: Tensor, more: Sequence[int], mask: Tensor) -> Tensor:
    """Each pivot in turn takes the free visual tokens of lowest cosine to it, ties to the lower number; no host sync.

    Args:
        pivots: ``[B, P]`` int64, in the order of their turns, -1 = none, which come last.
        states: ``[B, N + T, D]``, what is compared.
        more: how many tokens the pivots of each sample take in all, shared out evenly, the first ones taking one more.
        mask: ``[B, N]`` bool, False = padding.

    Returns:
        Code ``[B, N]`` int8 for ``select_topk``: 1 for visual pivots and all that is taken, 0 for other tokens, 2 for padding.
    """
    N, unit = mask.shape[1], normalize(states.float(), dim=-1)
    rest = whole_numbers(tuple(more), mask.device)[:, None]
    there = (pivots >= 0).sum(1, keepdim=True).clamp(min=1)
    turn = torch.arange(pivots.shape[1], device=mask.device)
    share = (rest // there + (turn < rest % there)) * (pivots >= 0)
    unlike = (ops.gather_tokens([unit], pivots)[0] @ unit[:, :N].transpose(1, 2)).neg_()
    free = torch.where(mask, 0, 2).to(torch.int8)
    code = torch.cat([free, free[:, :1]], 1)  # one place more takes what is padding
    chosen = torch.where(pivots < N, pivots, -1)
    for values, few in zip(unlike.unbind(1), share.unbind(1), strict=True):
        code.scatter_(1, torch.where(chosen < 0, N, chosen), 1)
        chosen = ops.select_topk(values, few, code=code[:, :N])[0]
    return code.scatter_(1, torch.where(chosen < 0, N, chosen), 1)[:, :N]
