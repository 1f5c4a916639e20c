"""Finds the share to keep that meets a budget: a cut of the prefill's FLOPs, or a mean number of visual tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vlmprune.errors import check
from vlmprune.flops import DecoderShape, Wave, decoder_flops, mean_tokens, prefill_flops, visual_inputs
from vlmprune.policies.base import PruningPolicy

LEAST, HALVINGS = 1e-9, 50


def keep_for_flops(policy: PruningPolicy, cut: float, shape: DecoderShape, visual: int, text: int) -> float:
    """The largest share for ``policy.at(share)`` that saves at least ``cut`` of the prefill's FLOPs (``vlmprune.flops``).

    Args:
        policy: whose stages and settings, but for how much they keep.
        cut: share of the FLOPs to save, as in ``run.report().flops.cut``.
        shape: the decoder's dimensions.
        visual: visual tokens of the prompt: one image.
        text: text tokens of the prompt; where a second wave runs, taken to stand behind the image.

    Raises:
        InputError: no share in (0, 1] meets the cut, the policy takes none, or a stage lies beyond the decoder.

    Example:
        >>> from vlmprune import FastV
        >>> from vlmprune.flops import DecoderShape
        >>> vicuna = DecoderShape(layers=32, hidden=4096, heads=32, kv_heads=32, head_dim=128, intermediate=11008)
        >>> keep_for_flops(FastV(layer=2), 0.5, vicuna, visual=576, text=60)
        0.418
    """
    full = decoder_flops(shape, [visual + text] * shape.layers)

    def left(share: float) -> float:
        stages = stage_counts(_at(policy, share), visual)
        wave = wave_rows(policy, stages, text)
        return prefill_flops(shape, visual, text, stages, wave) / full

    least, most = left(LEAST), left(1.0)
    fits = least <= 1 - cut <= most
    check(fits, "cut", f"a share between {1 - most:.4f} and {1 - least:.4f}", cut)
    return _largest(left, 1 - cut)


def keep_for_mean_tokens(policy: PruningPolicy, mean: float, layers: int, visual: int) -> float:
    """The largest share for ``policy.at(share)`` whose mean over layer inputs is at most ``mean`` visual tokens.

    Args:
        policy: as in ``keep_for_flops``.
        mean: the budget, as in ``run.report().tokens.mean_per_layer``.
        layers: decoder layers.
        visual: visual tokens of the prompt: one image.

    Raises:
        InputError: as for ``keep_for_flops``.

    Example:
        >>> from vlmprune import FastV
        >>> keep_for_mean_tokens(FastV(layer=2), 192, layers=32, visual=576)
        0.289
    """

    def left(share: float) -> float:
        stages = stage_counts(_at(policy, share), visual)
        return mean_tokens(visual_inputs(layers, visual, stages, wave_rows(policy, stages, 0)))

    least, most = left(LEAST), left(1.0)
    check(least <= mean <= most, "mean", f"tokens between {least:.2f} and {most:.2f}", mean)
    return _largest(left, mean)


def stage_counts(policy: PruningPolicy, visual: int) -> list[tuple[int, int]]:
    """Visual tokens after each stage ``(layer, tokens)`` for one image of ``visual`` tokens, as ``policy.kept`` says."""
    counts, left = [], visual
    for layer in policy.layers:
        left = policy.kept(visual if policy.needs(layer).restored else left, 1, layer)
        counts.append((layer, left))
    return counts


def wave_rows(policy: PruningPolicy, stages: Sequence[tuple[int, int]], text: int) -> Wave[int] | None:
    """The second wave of a policy that leaves ``stages``, as if all ``text`` stood behind the image.

    None = it has none, or nothing joins.
    """
    before = 0
    for layer, tokens in stages:
        if policy.needs(layer).wave and tokens > before:
            return layer, tokens - before + text
        before = tokens
    return None


def _at(policy: PruningPolicy, share: float) -> PruningPolicy:
    check(isinstance(policy, PruningPolicy), "policy", "a policy, such as FastV()", repr(policy))
    return policy.at(share)


def _largest(left: Callable[[float], float], budget: float) -> float:
    """The largest share whose cost stays in the budget, in as few decimals as give the same cost."""
    low, high = LEAST, 1.0
    if left(high) <= budget:
        return high
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if left(middle) <= budget else (low, middle)
    cost = left(low)
    short = (int(low * 10**digits) / 10**digits for digits in range(1, 10))
    return next((share for share in short if share > 0 and left(share) == cost), low)
