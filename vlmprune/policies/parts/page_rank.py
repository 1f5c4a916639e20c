"""PageRank over the attention of a layer's rows: what every visual token holds after some steps from even shares."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmprune.policies.inputs import AttentionInputs


def page_rank(seen: AttentionInputs, temperature: float, rounds: int) -> Tensor:
    """PageRank ``[B, N]`` float32 of the visual columns among the rows of this prompt chunk, one key head after another.

    What rows pay to a cached past is lost to it. The root of the mean square joins the heads.
    """
    (B, H, Sq, _), (heads, S) = seen.query.shape, seen.key.shape[1:3]
    place = torch.arange(S, device=seen.key.device)
    hidden = place > place[S - Sq :, None]
    start = torch.ones(B, Sq, device=seen.key.device)
    if seen.key_mask is not None:  # padding pays to all evenly, of nothing that it has
        real = seen.key_mask[:, S - Sq :]
        hidden = hidden | ~seen.key_mask[:, None, :] | ~real[:, :, None]
        start = real.float()
    hidden = hidden.view(-1, 1, Sq, S)
    start = (start / start.sum(1, keepdim=True).clamp(min=1))[:, None, None]
    squares = start.new_zeros(B, S)
    for query, key in zip(seen.query.chunk(heads, 1), seen.key.chunk(heads, 1), strict=True):
        rank = _steps(_pays(query, key, hidden, seen.scale / temperature), start, rounds)
        squares += rank.square_().sum((1, 2))
    return seen.across_ranks(squares / H, "mean").sqrt().gather(1, seen.columns.clamp(min=0))


def _pays(query: Tensor, key: Tensor, hidden: Tensor, scale: float) -> Tensor:
    """Softmax ``[B, h, Sq, S]`` of the rows of all heads that share a key; its logits are gone when it is made."""
    logits = (query.float() @ key.float().mT).mul_(scale)
    return logits.masked_fill_(hidden, torch.finfo(torch.float32).min).softmax(3)


def _steps(pays: Tensor, start: Tensor, rounds: int) -> Tensor:
    """What every key holds ``[B, h, 1, S]`` once the rows have paid so many times."""
    past = pays.shape[3] - pays.shape[2]
    rank = start.expand(-1, pays.shape[1], -1, -1)
    for _ in range(rounds - 1):
        rank = (rank @ pays)[..., past:]
    return rank @ pays
