"""A KV-cache layer that was shortened by pruning but still reports how many tokens it has SEEN.

generate() derives positions, slicing and masks from one sequence length; keeping that length logical (seen) while
the tensors hold fewer entries (stored) is what lets every generation feature go on without knowing of pruning.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import Cache, DynamicLayer

from vlmprune.errors import ModelError

Shift = int | Tensor | None
"""By how much positions lie below the number of tokens seen: the same for all samples, ``[B, 1]``, or not at all."""


class PrunedDynamicLayer(DynamicLayer):  # type: ignore[misc]
    """DynamicLayer whose ``get_seq_length`` counts tokens seen: stored entries plus ``dropped`` ones.

    ``valid`` is a bool ``[B, P]`` for the first P stored entries (entries after them are valid), or None if all are.
    ``shift`` says by how much rotary positions were packed; the tokens to come continue from there.
    Instances are made by changing the class of an existing DynamicLayer, so the caller's own cache object keeps working.
    """

    dropped: int = 0
    valid: Tensor | None = None
    shift: Shift = None
    pending: tuple[Tensor | None, int, Shift] | None = None

    def stored(self) -> int:
        """Entries physically held."""
        return super().get_seq_length()

    def get_seq_length(self) -> int:
        """Tokens seen so far, pruned ones included."""
        return self.stored() + self.dropped

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Mask length and offset: key j of the mask is the token seen at j + dropped, so causality stays right-aligned."""
        return self.stored() + query_length, self.dropped

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values; a chunk announced by ``announce`` also brings its validity and its dropped count."""
        rewritten = self.valid is not None or self.shift is not None
        if self.pending is None and (rewritten or (self.dropped and key_states.shape[-2] > 1)):
            raise ModelError(
                "past_key_values: expected the scope this cache was pruned in (its masks and positions belong to it), "
                "got a call of the model outside"
            )
        out = super().update(key_states, value_states, *args, **kwargs)
        if self.pending is not None:
            self.valid, newly_dropped, newly_shifted = self.pending
            self.dropped += newly_dropped
            if newly_shifted is not None:
                self.shift = newly_shifted if self.shift is None else self.shift + newly_shifted
            self.pending = None
        return out

    def announce(self, valid: Tensor | None, newly_dropped: int, newly_shifted: Shift = None) -> None:
        """Say what the next ``update`` means: validity of all then stored, tokens seen but not stored, positions packed."""
        self.pending = (valid, newly_dropped, newly_shifted)

    def validity(self, length: int) -> Tensor | None:
        """Bool ``[B, length]`` for the first ``length`` entries, or None if all are valid."""
        if self.valid is None:
            return None
        return F.pad(self.valid, (0, max(0, length - self.valid.shape[1])), value=True)[:, :length]

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens; only the negative form means something on a pruned layer."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"tokens_to_remove: expected a negative number on a pruned cache layer, got {tokens_to_remove}"
            )
        super().crop(tokens_to_remove)
        if self.valid is not None:
            self.valid = self.valid[:, : self.stored()]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder for beam search."""
        super().reorder_cache(beam_idx)
        if self.valid is not None:
            self.valid = self.valid.index_select(0, beam_idx.to(self.valid.device))
        if isinstance(self.shift, Tensor):
            self.shift = self.shift.index_select(0, beam_idx.to(self.shift.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sample."""
        super().batch_repeat_interleave(repeats)
        if self.valid is not None:
            self.valid = self.valid.repeat_interleave(repeats, dim=0)
        if isinstance(self.shift, Tensor):
            self.shift = self.shift.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some samples."""
        super().batch_select_indices(indices)
        if self.valid is not None:
            self.valid = self.valid[indices]
        if isinstance(self.shift, Tensor):
            self.shift = self.shift[indices]

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.dropped, self.valid, self.shift, self.pending = 0, None, None, None


def as_shift(shift: tuple[int, ...] | None, device: torch.device) -> Shift:
    """Samples' shifts as the cache layer keeps them."""
    if shift is None:
        return None
    if len(set(shift)) == 1:
        return shift[0] or None
    return torch.tensor(shift).to(device, non_blocking=True)[:, None]


def pruned_layer(cache: Cache | None, i: int) -> PrunedDynamicLayer | None:
    """Layer ``i`` of the cache if pruning has shortened it before, else None."""
    if cache is None or i >= len(cache.layers):
        return None
    layer = cache.layers[i]
    return layer if isinstance(layer, PrunedDynamicLayer) else None


def make_prunable(cache: Cache, i: int) -> PrunedDynamicLayer:
    """Layer ``i`` of the cache, able to count what it has seen. Raises ModelError for other kinds of cache layer."""
    if cache.layer_class_to_replicate is not None:
        while len(cache.layers) <= i:
            cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[i]
    if type(layer) is DynamicLayer:
        layer.__class__ = PrunedDynamicLayer
    if not isinstance(layer, PrunedDynamicLayer):
        raise ModelError(
            f"past_key_values: expected DynamicCache layers (DynamicLayer), got {type(layer).__name__}"
        )
    return layer


def past_validity(cache: Cache | None, i: int, seen: Tensor | None, q: int) -> Tensor | None:
    """Validity ``[B, past]`` of what layer ``i`` holds before a chunk of ``q`` tokens, or None if all of it is valid.

    A layer that was never pruned holds every token seen, so the 2-D attention mask ``seen [B, past + q]`` tells.
    """
    layer = pruned_layer(cache, i)
    if layer is not None:
        return layer.validity(layer.stored())
    return None if seen is None or seen.shape[1] == q else seen[:, :-q]


def extend_validity(old: Tensor | None, past: int, new: Tensor | None, rows: int) -> Tensor | None:
    """Validity ``[B, past + rows]`` of a past and a new chunk; None where both are all valid."""
    if old is None and new is None:
        return None
    some = new if new is not None else old
    assert some is not None
    batch, device = some.shape[0], some.device
    old = torch.ones(batch, past, dtype=torch.bool, device=device) if old is None else old.to(device)
    new = torch.ones(batch, rows, dtype=torch.bool, device=device) if new is None else new
    return torch.cat([old, new], dim=1)
