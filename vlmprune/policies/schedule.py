"""Finds the share to keep that meets a budget: a cut of the prefill's FLOPs, or a mean number of visual tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, fields

import torch
from torch import Tensor

from vlmprune.errors import check
from vlmprune.flops import DecoderShape, decoder_flops, layer_inputs, mean_tokens
from vlmprune.policies.base import (
    AttentionInputs,
    Grid,
    Needs,
    PruningPolicy,
    Reduction,
    TokenContext,
    VisionAttention,
)

Factory = PruningPolicy | type[PruningPolicy] | Callable[[float], PruningPolicy]
"""A policy or a policy class (see ``PruningPolicy.with_share``), or a function from a share to a policy."""

LEAST, HALVINGS, WORDS, WIDTH = 1e-9, 20, 8, 4  # few halvings: each asks the policy itself


def keep_for_flops(factory: Factory, cut: float, shape: DecoderShape, visual: int, text: int) -> float:
    """The largest share to keep, to a millionth, that saves at least ``cut`` of the prefill's FLOPs (``vlmprune.flops``).

    Args:
        factory: a policy, or its class for the default settings: ``with_share`` sets the share. Or ``lambda keep: ...``,
            for whatever else a share is to set.
        cut: share of the FLOPs to save, as in ``run.report().flops.cut``.
        shape: the decoder's dimensions.
        visual: visual tokens of the prompt: one image.
        text: text tokens of the prompt.

    Raises:
        InputError: no share in (0, 1] meets the cut, the policy has no setting that takes one, or a stage lies beyond
            the decoder.
    """
    sized = _sized(factory)
    full = decoder_flops(shape, [visual + text] * shape.layers)

    def left(keep: float) -> float:
        lengths = layer_inputs(shape.layers, visual, stage_counts(sized(keep), visual))
        return decoder_flops(shape, [n + text for n in lengths]) / full

    least, most = left(LEAST), left(1.0)
    fits = least <= 1 - cut <= most
    check(fits, "cut", f"a share between {1 - most:.4f} and {1 - least:.4f}", cut)
    return _largest(left, 1 - cut)


def keep_for_mean_tokens(factory: Factory, mean: float, layers: int, visual: int) -> float:
    """The largest share to keep, to a millionth, whose mean over layer inputs is at most ``mean`` visual tokens.

    Args:
        factory: as in ``keep_for_flops``.
        mean: the budget, as in ``run.report().tokens.mean_per_layer``.
        layers: decoder layers.
        visual: visual tokens of the prompt: one image.

    Raises:
        InputError: as for ``keep_for_flops``.
    """
    sized = _sized(factory)

    def left(keep: float) -> float:
        return mean_tokens(layer_inputs(layers, visual, stage_counts(sized(keep), visual)))

    least, most = left(LEAST), left(1.0)
    check(least <= mean <= most, "mean", f"tokens between {least:.2f} and {most:.2f}", mean)
    return _largest(left, mean)


def stage_counts(policy: PruningPolicy, visual: int) -> list[tuple[int, int]]:
    """Visual tokens after each stage ``(layer, tokens)`` for one image of ``visual`` tokens.

    The policy itself is asked, on random data, so these are its own counts. They are exact for every policy whose
    counts do not depend on the data; a union, an intersection or a rank gives that of the random data.
    """
    ordinals, counts = torch.arange(visual)[None], []
    for layer in policy.layers:
        choice = policy.select(_context(layer, policy.needs(layer), ordinals, visual))
        index = choice.index if isinstance(choice, Reduction) else choice
        ordinals = ordinals.gather(1, index).sort(dim=1).values
        counts.append((layer, index.shape[1]))
    return counts


def _sized(factory: Factory) -> Callable[[float], PruningPolicy]:
    """A function from a share to a policy."""
    if isinstance(factory, type):
        name, settings = factory.__name__, [f for f in fields(factory) if f.init]
        bare = [f.name for f in settings if f.default is MISSING and f.default_factory is MISSING]
        check(not bare, "factory", f"lambda keep: {name}(...)", f"{name}, which needs {', '.join(bare)}")
        factory = factory()
    return factory.with_share if isinstance(factory, PruningPolicy) else factory


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


def _context(layer: int, needs: Needs, ordinals: Tensor, visual: int) -> TokenContext:
    """One sample of one image and a few words after it, random in every value a policy could ask for."""
    g, n = torch.Generator().manual_seed(layer), ordinals.shape[1]
    rows = max(r for r in range(1, int(visual**0.5) + 1) if visual % r == 0) if visual else 1
    grid: Grid = (rows, visual // rows)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    return TokenContext(
        layer=layer,
        mask=torch.ones(1, n, dtype=torch.bool),
        counts=(n,),
        ordinals=ordinals,
        positions=ordinals,
        grids=((grid,),),
        hidden=draw(1, n, WIDTH),
        attention=_attention(n, needs, draw),
        embeds=draw(1, visual + WORDS, WIDTH),
        image=torch.arange(visual)[None],
        text=torch.arange(visual, visual + WORDS)[None],
        vision={
            i: VisionAttention(draw(1, 1, 1 + visual, 4), draw(1, 1, 1 + visual, 4), 0.5, True)
            for i in needs.vision
        },
        features=draw(1, visual, WIDTH),
        project=lambda features: features,
    )


def _attention(n: int, needs: Needs, draw: Callable[..., Tensor]) -> AttentionInputs:
    """Query and key of ``n`` visual tokens and the words after them, with no rotation."""
    S = n + WORDS
    every = torch.arange(S)[None]
    wanted = {"last": every[:, -1:], "text": every[:, n:], "all": every}[needs.rows]
    return AttentionInputs(
        query=draw(1, 1, S, WIDTH),
        key=draw(1, 1, S, WIDTH),
        last=every[:, -1:],
        rows=wanted,
        columns=every[:, :n],
        key_mask=None,
        rope=(torch.ones(1, S, WIDTH), torch.zeros(1, S, WIDTH)),
        scale=WIDTH**-0.5,
    )
