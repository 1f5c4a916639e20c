"""An attention call as the flash kernels see it, and the bounds of the sequences in a padded batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionCall:
    """One attention call. Causal means lower-right aligned; a call that is causal and has no mask is square.

    Attributes:
        query: ``[B, H, Sq, D]``; key, value: ``[B, Hkv, S, D]``.
        mask: None; 1-D int32 sequence bounds (``bounds``); or ``[B, 1 or H, Sq, S]``, bool (True = seen) or added.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    causal: bool
    scale: float | None
    dropout: float

    @property
    def packed(self) -> bool:
        """Whether the mask is a list of sequence bounds."""
        return self.mask is not None and self.mask.ndim == 1

    @property
    def alike(self) -> bool:
        """Whether query, key and value are of one dtype and head dim."""
        q, k, v = self.query, self.key, self.value
        return q.dtype == k.dtype == v.dtype and q.shape[-1] == v.shape[-1]

    @property
    def trains(self) -> bool:
        """Whether gradients will be asked for."""
        return torch.is_grad_enabled() and any(x.requires_grad for x in (self.query, self.key, self.value))

    @property
    def kind(self) -> tuple[torch.device, torch.dtype, int]:
        """What a kernel's answer goes by: device, dtype and head dim."""
        return self.query.device, self.query.dtype, self.query.shape[-1]


def bounds(valid: Tensor) -> Tensor:
    """Bounds ``[3 B + 1]`` int32 of the sequences in a padded batch: padding before, tokens, padding after, per sample.

    Args:
        valid: bool ``[B, S]``, in every sample one run of True (or none).
    """
    batch, length = valid.shape
    first = valid.int().argmax(1)
    edges = torch.stack([torch.zeros_like(first), first, first + valid.sum(1)], dim=1)
    edges = edges + torch.arange(0, batch * length, length, device=valid.device)[:, None]
    return torch.cat([edges.flatten(), edges.new_full((1,), batch * length)]).int()


def bounds_mask(call: AttentionCall) -> Tensor:
    """The bool mask ``[B, 1, S, S]`` that causal attention within a packed call's sequences amounts to."""
    assert call.mask is not None
    batch, _, length, _ = call.query.shape
    place = torch.arange(batch * length, device=call.mask.device)
    sequence = torch.bucketize(place, call.mask, right=True).view(batch, 1, length)
    same = sequence[..., :, None] == sequence[..., None, :]
    return same & torch.ones(length, length, dtype=torch.bool, device=place.device).tril()
