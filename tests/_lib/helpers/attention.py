"""What the tests of the attention backend share: a running call, a layer, tensors, and the definition of the log-sum-exp."""

from __future__ import annotations

from types import SimpleNamespace

import torch


class Wants:
    """The running call, as the backend sees it: every layer is scored from."""

    def __init__(self):
        self.lse = {}

    def scores_from(self, module):
        return True


def draw(batch, heads, kv_heads, rows, keys, dim, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = [(batch, heads, rows, dim), (batch, kv_heads, keys, dim), (batch, kv_heads, keys, dim)]
    return [torch.randn(s, generator=g).to(dtype) for s in shapes]


def layer(heads, kv_heads, causal=True):
    return SimpleNamespace(
        layer_idx=3, is_causal=causal, num_key_value_groups=heads // kv_heads, training=False
    )


def lower_right(rows, keys, padding=(0, 0)):
    valid = torch.arange(keys) >= torch.tensor(padding)[:, None]
    return torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows) & valid[:, None, None]


def doubled(seen):
    return seen.double() if seen is not None and seen.dtype != torch.bool else seen


def logits_of(q, k, seen, causal):
    """Scaled logits in float64, -inf where unseen, and which rows see anything."""
    groups, (rows, keys) = q.shape[1] // k.shape[1], (q.shape[2], k.shape[2])
    logits = q.double() @ k.double().repeat_interleave(groups, 1).transpose(2, 3) * 0.3
    if seen is None and causal and rows > 1:  # from position 0 on
        seen = torch.ones(rows, keys, dtype=torch.bool).tril()
    if seen is not None and seen.dtype == torch.bool:
        logits = logits.masked_fill(~seen, float("-inf"))
    elif seen is not None:
        logits = logits + seen.double()
    return logits, logits.isfinite().any(-1)
