"""How fast a model could be at best: for each layer the larger of its FLOPs at the peak rate and its bytes at the peak bandwidth.

Bytes are the fewest: weights once a pass, keys and values written (prefill) or read and written (decode). Activations are
left out, and so is the half of the attention scores that causality skips. Layers run one after the other, so their times
add up. Pure arithmetic; ``peaks.py`` measures the rates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vlmprune.errors import check
from vlmprune.flops import DecoderShape, Wave, causal_half_flops, decoder_layer_flops, wave_flops


@dataclass(frozen=True)
class Peaks:
    """What a device does at best.

    Attributes:
        flops: per second, of a large matrix product in the model's dtype.
        bandwidth: bytes per second of a large copy, read plus written.
    """

    flops: float
    bandwidth: float

    def seconds(self, flops: float, moved: float) -> float:
        """The least time for so many FLOPs and bytes.

        >>> Peaks(flops=10, bandwidth=2).seconds(100, 10)
        10.0
        """
        return max(flops / self.flops, moved / self.bandwidth)


@dataclass(frozen=True)
class Decoder:
    """A decoder with its language-model head.

    Attributes:
        shape: its dimensions.
        vocab: rows of the head.
        width: bytes of a weight, a key's or a value's element.
    """

    shape: DecoderShape
    vocab: int
    width: int

    @property
    def layer_weights(self) -> int:
        """Weights of one layer's matrices."""
        return (self._flops(1) - 4 * self.shape.heads * self.shape.head_dim) // 2

    @property
    def kv(self) -> int:
        """Bytes of one token's key and value in one layer."""
        return 2 * self.shape.kv_heads * self.shape.head_dim * self.width

    def prefill_seconds(self, lengths: Sequence[int], batch: int, peaks: Peaks) -> float:
        """The least time of ``batch`` prompts whose layer ``i`` sees ``lengths[i]`` tokens, and of the logits of their last rows."""
        self._check(lengths)
        total = self._head(batch, peaks)
        for n in lengths:
            skipped = causal_half_flops(n, self.shape.heads, self.shape.head_dim)
            moved = self.layer_weights * self.width + batch * n * self.kv
            total += peaks.seconds(batch * (self._flops(n) - skipped), moved)
        return total

    def wave_seconds(self, wave: Wave[int], lengths: Sequence[int], batch: int, peaks: Peaks) -> float:
        """The least time of a second wave (``flops.wave_flops``): its layers' weights are read once more."""
        layers, rows = wave
        moved = self.layer_weights * self.width + batch * rows * self.kv
        return layers * peaks.seconds(batch * wave_flops(self.shape, lengths, wave) / layers, moved)

    def decode_seconds(self, cached: Sequence[float], batch: int, peaks: Peaks) -> float:
        """The least time of one step for ``batch`` samples whose layer ``i`` has ``cached[i]`` entries before it."""
        self._check(cached)
        total = self._head(batch, peaks)
        for n in cached:
            flops = batch * self._step_flops(n)
            moved = self.layer_weights * self.width + batch * (n + 1) * self.kv
            total += peaks.seconds(flops, moved)
        return total

    def decode_flops(self, cached: Sequence[float], batch: int) -> float:
        """FLOPs of one step, the head left out as in ``vlmprune.flops``."""
        return batch * sum(map(self._step_flops, cached))

    def _step_flops(self, cached: float) -> float:
        return 2 * self.layer_weights + 4 * (cached + 1) * self.shape.heads * self.shape.head_dim

    def _flops(self, n: int) -> int:
        s = self.shape
        return decoder_layer_flops(n, s.hidden, s.heads, s.kv_heads, s.head_dim, s.intermediate)

    def _head(self, batch: int, peaks: Peaks) -> float:
        weights = self.shape.hidden * self.vocab
        return peaks.seconds(2 * batch * weights, weights * self.width)

    def _check(self, lengths: Sequence[float]) -> None:
        expected = f"{self.shape.layers} numbers, one per layer"
        check(len(lengths) == self.shape.layers, "lengths", expected, len(lengths))
