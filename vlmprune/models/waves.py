"""A second wave (``Needs(wave=True)``): tokens that come back run through the layers that they missed.

The first wave is what a stage at layer 0 left, with all text; it runs the layers before the stage that has the need. That
one names more tokens. These and every row behind the last image, which is to see them, run the same layers, at their own
positions, over the keys and values of the first wave. So in those layers a row sees what stands in front of it, but rows of
the first wave (kept tokens, and text in front of the last image) none of the second; behind them every row sees what stands
in front of it. Nothing of the first wave is computed again but the text behind the last image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vlmprune import ops
from vlmprune.models.host.cache_view import entries, held_keys, held_values

Entries = tuple[Tensor, Tensor]
"""Keys and values, each ``[B, Hkv, S, D]``."""


@dataclass
class Waves:
    """Stands in for the KV cache at the layers that two waves run: the cache itself sees both as one chunk, in its order.

    Attributes:
        cache: the call's; None = it has none.
        past: tokens that it had seen before.
        inputs: ``[B, q, D]`` all rows as they entered layer 0.
        held: what the first wave left, by layer.
        order: ``[B, n]`` which row of the first wave, or behind those of the second, each row of the chunk is, -1 = padding;
            None = the first wave is under way.
    """

    cache: Any
    past: int
    inputs: Tensor
    held: dict[int, Entries] = field(default_factory=dict)
    order: Tensor | None = None

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Entries:
        """Take a wave's keys and values; returns all that its rows may see. Called by a layer's attention, as a cache is."""
        if self.order is None:
            self.held[layer_idx] = key, value
            return self.seen(layer_idx)
        pairs = zip(self.held.pop(layer_idx), (key, value), strict=True)
        both = [torch.cat(pair, 2) for pair in pairs]
        key, value = ops.gather_tokens(both, self.order.to(key.device))
        if self.cache is None:
            return key, value
        out: Entries = self.cache.update(key, value, layer_idx, *args, **kwargs)
        return out

    def seen(self, i: int) -> Entries:
        """What layer ``i`` held before the call, and behind it what the first wave left there."""
        return self.keys(i), self._behind(i, self.held[i][1], held_values)

    def keys(self, i: int) -> Tensor:
        """The keys alone of what ``seen`` gives."""
        return self._behind(i, self.held[i][0], held_keys)

    def _behind(self, i: int, new: Tensor, held: Callable[[Any, int, torch.device], Tensor]) -> Tensor:
        past = 0 if self.cache is None else entries(self.cache, i, self.past)
        return torch.cat([held(self.cache.layers[i], past, new.device), new], 2) if past else new
