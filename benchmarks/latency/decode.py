"""What a decode step would take on a card: the bytes it must read, over the bandwidth. A bound from below, no measurement.

Every step reads all weights of the decoder and the head once, and the keys and values that each sample holds. Arithmetic,
launches, activations and the one new row of the cache are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from micro.shapes import SHAPES, Shape

from vlmprune import FastV
from vlmprune.flops import DecoderShape, layer_inputs
from vlmprune.policies.schedule import stage_counts

from .cards import CARDS, guess

BYTES = 2  # of a bfloat16
LAYER = 2  # where FastV prunes: the layers before it keep the KV of all tokens
BATCHES = (1, 16)
VOCABULARY = {"llava": 32064, "qwen2.5": 152064}  # rows of the head, by the first word of a shape's name
TIMES = tuple(f"{card} ms, pruned" for card in CARDS)
HEADS = ("decode step", "batch", "weights GB", "KV GB", "pruned", *TIMES, "faster", "measured")


def weight_bytes(model: DecoderShape, vocabulary: int) -> int:
    """Bytes of the matrices that one step reads: every layer's, and the head's."""
    heads = (
        2 * model.hidden * model.heads * model.head_dim + 2 * model.hidden * model.kv_heads * model.head_dim
    )
    return BYTES * (
        model.layers * (heads + 3 * model.hidden * model.intermediate) + model.hidden * vocabulary
    )


def kv_bytes(model: DecoderShape, lengths: Sequence[int]) -> int:
    """Bytes of the keys and values of one sample whose layer ``i`` holds ``lengths[i]`` tokens."""
    return BYTES * 2 * model.kv_heads * model.head_dim * sum(lengths)


class Step(NamedTuple):
    """Bytes of the first decode step behind a prompt of one image, or of a batch of such."""

    shape: Shape
    batch: int
    weights: int
    full: int  # KV, unpruned
    pruned: int  # KV behind FastV

    def milliseconds(self, card: str, level: str = "typical") -> tuple[float, float]:
        """(unpruned, pruned) at the card's bandwidth."""
        rate = guess(card, "bandwidth", level).bandwidth * 1e9  # bytes in a millisecond
        return (self.weights + self.full) / rate, (self.weights + self.pruned) / rate

    @property
    def faster(self) -> float:
        """Unpruned over pruned: the same on every card."""
        return (self.weights + self.full) / (self.weights + self.pruned)


def step(shape: Shape, batch: int) -> Step:
    """The step of a shape; text tokens are held by all layers."""
    model, text = shape.model, shape.before + shape.after
    kept = layer_inputs(
        model.layers, shape.visual, stage_counts(FastV(layer=LAYER, keep=shape.keep), shape.visual)
    )
    weights = weight_bytes(model, VOCABULARY[shape.name.partition("-")[0]])
    full, pruned = (
        batch * kv_bytes(model, [n + text for n in visual])
        for visual in ([shape.visual] * model.layers, kept)
    )
    return Step(shape, batch, weights, full, pruned)


def cells() -> list[tuple[str, ...]]:
    """A line for every shape and batch. "measured" is empty until somebody has."""
    out = []
    for batch in BATCHES:
        for shape in SHAPES:
            x = step(shape, batch)
            times = (f"{a:.2f}, {b:.2f}" for a, b in map(x.milliseconds, CARDS))
            size = (f"{n / 1e9:.2f}" for n in (x.weights, x.full, x.pruned))
            name = f"{shape.name}, {shape.visual:,} -> {shape.keep:,}"
            out.append((name, str(batch), *size, *times, f"{x.faster:.2f}x", ""))
    return out


def markdown() -> Iterator[str]:
    """The table of benchmarks/README.md, line by line."""
    yield f"| {' | '.join(HEADS)} |"
    yield f"| --- |{' ---: |' * (len(HEADS) - 1)}"
    for line in cells():
        yield f"| {' | '.join(line)} |"
