"""Keys of a vision layer as features of the visual tokens, by which methods compare them."""

from __future__ import annotations

from torch import Tensor

from vlmprune.policies.base import VisionAttention


def mean_keys(seen: VisionAttention) -> Tensor:
    """The key of every token's patches, averaged over heads: ``[I, T, D]`` float32."""
    return seen.per_token(seen.key[:, :, int(seen.cls) :].float().mean(1))


def joined_keys(seen: VisionAttention) -> Tensor:
    """The same with all heads side by side: ``[I, T, H D]`` float32."""
    return seen.per_token(seen.key[:, :, int(seen.cls) :].transpose(1, 2).flatten(2))
