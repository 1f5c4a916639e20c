"""KV-cache layers that were shortened by pruning but still report how many tokens they have SEEN.

generate() derives positions, slicing and masks from one sequence length; keeping that length logical (seen) while
the tensors hold fewer entries (stored) is what lets every generation feature go on without knowing of pruning.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import cache_utils
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    HQQQuantizedLayer,
    QuantoQuantizedLayer,
    StaticLayer,
)

from vlmprune import ops
from vlmprune.errors import InputError, ModelError

Length = int | Tensor
"""Entries held; a 0-d tensor in a static cache, whose decode step must not depend on a Python number."""


def lengthen(known: Tensor, length: int, fill: float = True) -> Tensor:
    """Validity of the first ``length`` entries, or another number; those that nothing is known about are valid, or ``fill``."""
    return F.pad(known, (0, max(0, length - known.shape[1])), value=fill)[:, :length]


Plain: Any = CacheLayerMixin  # Any: what a subclass finds above it depends on the other base


class PrunedLayer(Plain):  # type: ignore[misc]
    """What pruning adds to a cache layer of any kind: ``get_seq_length`` counts stored entries plus ``dropped`` ones.

    Instances are made by changing the class of an existing layer, so the caller's own cache object keeps working. (For
    that this class must grow from the same base as the layers do: Python compares the object layouts.)

    Attributes:
        dropped: tokens seen but not held.
        valid: bool ``[B, P]`` for the first P stored entries (entries after them are valid); None = all are.
        shift: ``[B, 1]`` by how much rotary positions were packed (the tokens to come go on from there), or None.
        bias: ``[B, P]`` float32 what is added to the logits that the first P stored entries receive (0 to those of entries
            after them); None = nothing is.
        pending: what ``announce`` or ``admit`` said about the next ``update``.
    """

    keys: Any
    values: Any
    dropped: int = 0
    valid: Tensor | None = None
    shift: Tensor | None = None
    bias: Tensor | None = None
    pending: tuple[Tensor | None, int, Tensor | None, Tensor | None] | tuple[()] | None = None
    static: ClassVar[bool] = False

    def stored(self) -> Any:
        """Entries physically held: an int, in a static cache a 0-d tensor."""
        return super().get_seq_length()

    def get_seq_length(self) -> int:
        """Tokens seen so far, pruned ones included (in a static cache a 0-d tensor, as transformers has it there)."""
        return self.stored() + self.dropped

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Mask length and offset: key j of the mask is the token seen at j + dropped, so causality stays right-aligned."""
        return int(self.stored()) + query_length, self.dropped

    def announce(
        self,
        valid: Tensor | None,
        newly_dropped: int,
        shift: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> None:
        """Say what the next ``update`` means: validity of all then stored, tokens seen but not stored, shift from then on,
        and what is added to the logits of all then stored."""
        self.pending = (valid, newly_dropped, shift, bias)

    def admit(self) -> None:
        """Say that the next ``update`` is a decode step with the right mask and positions: it changes nothing here."""
        self.pending = ()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values. Raises ModelError for a chunk that only a pruning scope could have masked rightly."""
        if self.pending is None and self._needs_scope(key_states.shape[-2]):
            raise ModelError(
                "cache: expected a pruning scope (this cache was pruned in one: its masks and positions need the hooks), "
                "got a call of the model outside of any"
            )
        out: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
        self.settle()
        return out

    def settle(self) -> None:
        """The ``update`` that was announced has happened."""
        if self.pending:
            self.valid, newly_dropped, self.shift, self.bias = self.pending
            self.dropped += newly_dropped
        self.pending = None

    def _needs_scope(self, rows: int) -> bool:
        told = any(known is not None for known in (self.valid, self.shift, self.bias))
        return told or (self.dropped > 0 and rows > 1)

    def key_mask(self, valid: Tensor | None, past: Length, hidden: Tensor) -> Tensor | None:
        """Which keys the rows ``hidden [B, n, D]`` to come may see at all: bool ``[B, past + n]``, None = all."""
        return None if valid is None else lengthen(valid, int(past) + hidden.shape[1])

    def forget(self, count: int, valid: Tensor | None, bias: Tensor | None = None) -> None:
        """Count as dropped what ``keep_entries`` removes; ``valid`` and ``bias`` are of the entries that stay."""
        self.valid, self.bias, self.dropped = valid, bias, self.dropped + count

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens, which must lie behind the pruned ones: not down to a length, as a positive one means."""
        least = -int(self.stored())
        if not least <= tokens_to_remove <= 0:
            expected = f"a negative number, at least {least}, on a pruned cache layer"
            raise InputError(f"tokens_to_remove: expected {expected}, got {tokens_to_remove}")
        if self.static and not self._all_valid(tokens_to_remove - least, -least):
            expected = "a number that reaches no padding in a static cache (compacting leaves it behind the shorter samples)"
            raise InputError(f"tokens_to_remove: expected {expected}, got {tokens_to_remove}")
        super().crop(tokens_to_remove)
        if self.valid is not None and not self.static:  # what a static one writes next is valid as well
            self.valid = self.valid[:, : self.stored()]
        if self.bias is not None:  # nothing is added to what is written next
            written = torch.arange(self.bias.shape[1], device=self.bias.device) < self.stored()
            self.bias = self.bias.masked_fill(~written, 0.0)

    def _all_valid(self, start: int, end: int) -> bool:
        return self.valid is None or bool(self.valid[:, start:end].all())

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder for beam search."""
        super().reorder_cache(beam_idx)
        self._each(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sample."""
        super().batch_repeat_interleave(repeats)
        self._each(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some samples."""
        super().batch_select_indices(indices)
        self._each(lambda t: t[indices])

    def _each(self, change: Any) -> None:
        """Change what is kept per sample."""
        self.valid = None if self.valid is None else change(self.valid)
        self.shift = None if self.shift is None else change(self.shift)
        self.bias = None if self.bias is None else change(self.bias)

    def reset(self) -> None:
        """Forget everything, also that it was ever pruned."""
        super().reset()
        for name in ("dropped", "valid", "shift", "bias", "pending"):
            self.__dict__.pop(name, None)
        self.__class__ = type(self).__bases__[1]


class PrunedDynamicLayer(PrunedLayer, DynamicLayer):  # type: ignore[misc]  # untyped base
    """The default kind: grows by concatenation; compacting it frees memory."""


class PrunedStaticLayer(PrunedLayer, StaticLayer):  # type: ignore[misc]  # untyped base
    """Preallocated. ``cumulative_length`` stays the number of entries stored: it is where the next one is written.

    A decode step reads only tensors (that length, keys, values, ``valid [B, max_cache_len]``), so it compiles to one graph.
    """

    static = True

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Every mask spans the whole allocation."""
        return self.max_cache_len, self.dropped

    def announce(
        self,
        valid: Tensor | None,
        newly_dropped: int,
        shift: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> None:
        """As above; validity and bias get their final size, so that a compiled decode step sees one shape."""
        super().announce(self._whole(valid), newly_dropped, shift, self._whole(bias, 0.0))

    def _whole(self, known: Tensor | None, fill: float = True) -> Tensor | None:
        """What is known of the entries, for the whole allocation."""
        return None if known is None else lengthen(known, self.max_cache_len, fill)

    def _needs_scope(self, rows: int) -> bool:
        return True  # a mask made for the tokens seen would show entries that hold nothing

    def key_mask(self, valid: Tensor | None, past: Length, hidden: Tensor) -> Tensor | None:
        """Bool ``[B, max_cache_len]``: entries not written yet are hidden too, as some backends know no causal mask."""
        order = torch.arange(self.max_cache_len, device=hidden.device)
        written = (order < past + hidden.shape[1]).expand(hidden.shape[0], -1)
        return written if valid is None else written & lengthen(valid, self.max_cache_len)

    def forget(self, count: int, valid: Tensor | None, bias: Tensor | None = None) -> None:
        """The same; the allocation stays, and the freed entries are written next."""
        super().forget(count, self._whole(valid), self._whole(bias, 0.0))
        self.cumulative_length.sub_(count)


class PrunedQuantoLayer(PrunedLayer, QuantoQuantizedLayer):  # type: ignore[misc]  # untyped base
    """Quantized by optimum-quanto."""


class PrunedHQQLayer(PrunedLayer, HQQQuantizedLayer):  # type: ignore[misc]  # untyped base
    """Quantized by HQQ."""


QUANTIZED: tuple[Any, ...] = (cache_utils.QuantizedLayer,)
"""Kinds whose keys are only approximately those that attention saw."""

KINDS: list[type] = [PrunedDynamicLayer, PrunedStaticLayer, PrunedQuantoLayer, PrunedHQQLayer]

if hasattr(cache_utils, "Fp8QuantizedLayer"):  # since transformers 5.18

    class PrunedFp8Layer(PrunedLayer, cache_utils.Fp8QuantizedLayer):  # type: ignore[misc]
        """Quantized to 8-bit floats."""

    KINDS.append(PrunedFp8Layer)
    QUANTIZED += (cache_utils.Fp8QuantizedLayer,)

PRUNED = {kind.__bases__[1]: kind for kind in KINDS}
"""Pruned class by the class of the layer that becomes one."""


AT_ONCE = 32
"""Layers whose keys and values one launch takes; those before are freed by then."""


def keep_entries(layers: Sequence[Any], at: Tensor, static: bool) -> None:
    """Hold only the entries at key positions ``at [B, n]`` (-1 = padding), in layers of one kind on one device, in one call.

    Growing layers get new, smaller tensors. Static ones keep theirs: there positions ascend, with padding on the right.
    """
    if static:
        return ops.compact_kv(_held(layers), at)
    for start in range(0, len(layers), AT_ONCE):
        some = layers[start : start + AT_ONCE]
        kept = ops.gather_tokens(_held(some), at)
        for layer, keys, values in zip(some, kept[::2], kept[1::2], strict=True):
            layer.keys, layer.values = keys, values


def fill(layer: Any, keys: Tensor, values: Tensor) -> None:
    """Let an empty layer hold these; a growing one takes the tensors themselves, where ``update`` would copy them."""
    if not isinstance(layer, DynamicLayer):
        layer.update(keys, values)
        return
    # what lazy_initialization does, but for two empty tensors a layer
    layer.keys, layer.values, layer.is_initialized = keys, values, True
    layer.dtype, layer.device = keys.dtype, keys.device
    if isinstance(layer, PrunedLayer):
        layer.settle()


def _held(layers: Sequence[Any]) -> list[Tensor]:
    """Keys and values in turn; detached, as a prefill with gradients leaves a graph."""
    return [x.detach() for layer in layers for x in (layer.keys, layer.values)]
