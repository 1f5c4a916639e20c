"""Counts the FLOPs and tokens of a prefill: our convention first, then the ones published tables were made with.

Ours: 2 x multiply-accumulates, every matrix of the model, text included, attention scores counted in full.
Norms, activations, softmax and rotary embeddings are left out, as everywhere in this field.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from vlmprune.errors import check

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class DecoderShape:
    """The dimensions of a decoder with gated feed-forward blocks (LLaMA, Mistral, Qwen2).

    Attributes:
        layers: number of decoder layers.
        hidden: width of the hidden states.
        heads: query heads.
        kv_heads: key and value heads.
        head_dim: width of one head.
        intermediate: width inside the feed-forward block.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int


Wave = tuple[int, Number]
"""A second wave (``Needs(wave=True)``): the stage before which it runs, and the rows, of text too, that run it."""


def decoder_layer_flops(
    n: Number,
    hidden: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    intermediate: int,
    keys: Number | None = None,
) -> Number:
    """FLOPs of one decoder layer on ``n`` tokens: projections and gated feed-forward, then scores and values.

    ``2 * (n * (2 d H dh + 2 d Hkv dh + 3 d m)) + 4 n^2 H dh``. The causal half of the attention is counted;
    ``causal_half_flops`` says how much that is. Where they attend to ``keys``, and not to themselves, it is ``4 n keys H dh``.
    """
    matrices = 2 * hidden * heads * head_dim + 2 * hidden * kv_heads * head_dim + 3 * hidden * intermediate
    return 2 * (n * matrices) + 4 * n * (n if keys is None else keys) * heads * head_dim


def causal_half_flops(n: Number, heads: int, head_dim: int) -> Number:
    """FLOPs that ``decoder_layer_flops`` counts for scores above the diagonal, which a causal kernel may skip."""
    return 2 * n * (n - 1) * heads * head_dim


def decoder_flops(shape: DecoderShape, lengths: Sequence[Number]) -> Number:
    """FLOPs of one prefill whose layer ``i`` sees ``lengths[i]`` tokens (text and visual).

    Raises:
        ValueError: ``lengths`` is not one number per layer.
    """
    check(len(lengths) == shape.layers, "lengths", f"{shape.layers} numbers, one per layer", len(lengths))
    dims = (shape.hidden, shape.heads, shape.kv_heads, shape.head_dim, shape.intermediate)
    return sum(decoder_layer_flops(n, *dims) for n in lengths)


def layer_inputs(total_layers: int, n: Number, stages: Sequence[tuple[int, Number]]) -> list[Number]:
    """Tokens that enter each layer: ``n``, and from layer K on ``n_after`` for every stage ``(K, n_after)``.

    Raises:
        ValueError: the stages' layers are not ascending or not in 0..total_layers-1.
    """
    at = [layer for layer, _ in stages]
    ok = at == sorted(set(at)) and all(0 <= layer < total_layers for layer in at)
    check(ok, "stages", f"ascending layers in 0..{total_layers - 1}", at)
    lengths = [n] * total_layers
    for layer, after in stages:
        lengths[layer:] = [after] * (total_layers - layer)
    return lengths


def visual_inputs(
    total_layers: int, visual: Number, stages: Sequence[tuple[int, Number]], wave: Wave[Number] | None = None
) -> list[Number]:
    """Visual tokens that run each layer, where ``stages`` leave ``(layer, tokens)``: those of both waves where there are two."""
    counts = layer_inputs(total_layers, visual, stages)
    return counts if wave is None else [counts[wave[0]]] * wave[0] + counts[wave[0] :]


def prefill_flops(
    shape: DecoderShape,
    visual: Number,
    text: Number,
    stages: Sequence[tuple[int, Number]],
    wave: Wave[Number] | None = None,
) -> Number:
    """FLOPs of a prefill of ``visual`` and ``text`` tokens where ``stages`` leave ``(layer, visual tokens)``."""
    lengths = [n + text for n in layer_inputs(shape.layers, visual, stages)]
    return decoder_flops(shape, lengths) + wave_flops(shape, lengths, wave)


def wave_flops(shape: DecoderShape, lengths: Sequence[Number], wave: Wave[Number] | None) -> Number:
    """FLOPs of a second wave, whose rows see all ``lengths[layer]`` that enter its stage; 0 = there is none."""
    if wave is None:
        return 0
    layer, rows = wave
    dims = (shape.hidden, shape.heads, shape.kv_heads, shape.head_dim, shape.intermediate)
    return layer * decoder_layer_flops(rows, *dims, keys=lengths[layer])


def mean_tokens(lengths: Sequence[float]) -> float:
    """Mean over layer inputs. SparseVLM averages what leaves its pruning layers instead, which is less."""
    check(len(lengths) > 0, "lengths", "at least one layer", "none")
    return sum(lengths) / len(lengths)


def fastv_layer_macs(n: Number, d: int, m: int) -> Number:
    """FastV's and FEATHER's cost of one layer: ``4 n d^2 + 2 n^2 d + 2 n d m``.

    Multiply-accumulates, though printed as FLOPs; two feed-forward matrices, though LLaMA has three. FastV's table
    counts text tokens and prints the mean per layer; FEATHER counts image tokens only.
    """
    return 4 * n * d * d + 2 * n * n * d + 2 * n * d * m


def sparsevlm_layer_macs(n: Number, d: int, m: int) -> Number:
    """SparseVLM's cost of one layer, with all three feed-forward matrices: ``4 n d^2 + 2 n^2 d + 3 n d m``."""
    return 4 * n * d * d + 2 * n * n * d + 3 * n * d * m


def fastv_reduction(
    lengths_by_layer: Sequence[Number],
    d: int,
    m: int,
    layer_macs: Callable[[Number, int, int], Number] = fastv_layer_macs,
) -> float:
    """The share of the cost saved, as FastV and FEATHER state it: ``1 - sum_i C(n_i) / (T C(n_0))``.

    Args:
        lengths_by_layer: tokens entering each of the T layers, the first one unpruned.
        d: hidden width.
        m: feed-forward width.
        layer_macs: ``fastv_layer_macs``, or ``sparsevlm_layer_macs`` for the three-matrix variant.
    """
    check(len(lengths_by_layer) > 0, "lengths_by_layer", "at least one layer", "none")
    full = len(lengths_by_layer) * layer_macs(lengths_by_layer[0], d, m)
    return 1 - sum(layer_macs(n, d, m) for n in lengths_by_layer) / full
