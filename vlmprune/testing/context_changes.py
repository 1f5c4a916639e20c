"""A context made different in one way: fewer samples, broken or repeated values, half the precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from vlmprune.policies.base import AttentionInputs, TokenContext


def inputs_of(ctx: TokenContext) -> dict[str, Tensor]:
    """Every tensor of numbers in a context by name, each ``[B or I, ..., tokens, width]``."""
    found = {"hidden": ctx.hidden, "embeds": ctx.embeds, "features": ctx.features}
    if ctx.attention is not None:
        found |= {"query": ctx.attention.query, "key": ctx.attention.key}
    for layer, seen in ctx.vision.items():
        found |= {f"vision[{layer}].query": seen.query, f"vision[{layer}].key": seen.key}
    return {name: x for name, x in found.items() if x is not None}


def with_inputs(ctx: TokenContext, new: Mapping[str, Tensor]) -> TokenContext:
    """The same context with other tensors, named as in ``inputs_of``."""
    attention = ctx.attention
    if attention is not None:
        query, key = new.get("query", attention.query), new.get("key", attention.key)
        attention = replace(attention, query=query, key=key)
    vision = {
        layer: replace(
            seen,
            query=new.get(f"vision[{layer}].query", seen.query),
            key=new.get(f"vision[{layer}].key", seen.key),
        )
        for layer, seen in ctx.vision.items()
    }
    hidden, embeds = new.get("hidden", ctx.hidden), new.get("embeds", ctx.embeds)
    features = new.get("features", ctx.features)
    return replace(ctx, hidden=hidden, embeds=embeds, features=features, attention=attention, vision=vision)


def each(ctx: TokenContext, change: Callable[[Tensor], Tensor]) -> TokenContext:
    """The same change of every input."""
    return with_inputs(ctx, {name: change(x) for name, x in inputs_of(ctx).items()})


def copied(ctx: TokenContext) -> TokenContext:
    """The same values in other memory, where a policy writes without harm."""
    mask, ordinals, positions = (x.clone() for x in (ctx.mask, ctx.ordinals, ctx.positions))
    return replace(each(ctx, Tensor.clone), mask=mask, ordinals=ordinals, positions=positions)


def repeated(ctx: TokenContext, distinct: int) -> TokenContext:
    """Every input with so many distinct tokens, in turn."""
    return each(ctx, lambda x: x[..., torch.arange(x.shape[-2]) % distinct, :])


def halved(ctx: TokenContext, dtype: torch.dtype) -> TokenContext:
    """Every input and the rotary tables in another precision."""
    ctx = each(ctx, lambda x: x.to(dtype))
    if ctx.attention is None:
        return ctx
    cos, sin = ctx.attention.rope
    return replace(ctx, attention=replace(ctx.attention, rope=(cos.to(dtype), sin.to(dtype))))


def broken(ctx: TokenContext, sample: int, value: float, name: str | None = None) -> TokenContext:
    """One sample's inputs hold ``value``: one token of the input ``name``, or with None all tokens of all inputs."""
    first = sum(map(len, ctx.grids[:sample]))
    own = slice(first, first + len(ctx.grids[sample]))
    new = {}
    for key, x in inputs_of(ctx).items():
        if name in (None, key):
            new[key] = x.clone()
            part = new[key][
                own if key == "features" or key.startswith("vision") else slice(sample, sample + 1)
            ]
            part[..., slice(None) if name is None else _one_token(ctx, key, sample, part), :] = value
    return with_inputs(ctx, new)


def _one_token(ctx: TokenContext, name: str, sample: int, x: Tensor) -> int:
    """Of one sample's input, a token that counts: a visual one, or the last query row."""
    if name == "key" and ctx.attention is not None:
        return int(ctx.attention.columns[sample, 0])
    if name == "embeds" and ctx.image is not None:
        return int(ctx.image[sample, 0])
    return 0 if name in ("hidden", "features") else x.shape[-2] - 1


def first_alone(ctx: TokenContext) -> TokenContext:
    """The first sample of a batch without an earlier turn, cut out and rid of all padding."""
    n, images = ctx.counts[0], len(ctx.grids[0])
    vision = {
        layer: replace(seen, query=seen.query[:images], key=seen.key[:images])
        for layer, seen in ctx.vision.items()
    }
    return replace(
        ctx,
        counts=ctx.counts[:1],
        grids=ctx.grids[:1],
        sizes=None if ctx.sizes is None else ctx.sizes[:1],
        mask=ctx.mask[:1, :n],
        ordinals=ctx.ordinals[:1, :n],
        positions=ctx.positions[:1, :n],
        hidden=None if ctx.hidden is None else ctx.hidden[:1, :n],
        attention=None if ctx.attention is None else _first_rows(ctx.attention),
        embeds=None if ctx.embeds is None else ctx.embeds[:1],
        image=None if ctx.image is None else _real(ctx.image),
        text=None if ctx.text is None else _real(ctx.text),
        vision=vision,
        features=None if ctx.features is None else ctx.features[:images],
    )


def _first_rows(seen: AttentionInputs) -> AttentionInputs:
    """The first sample's query and key without the padding to the left of its prompt."""
    pad = 0 if seen.key_mask is None else int((~seen.key_mask[0]).sum())
    real = seen.key.shape[2] - pad
    cos, sin = (t[:1, pad:] for t in seen.rope)
    return replace(
        seen,
        query=seen.query[:1, :, -real:],
        key=seen.key[:1, :, pad:],
        last=seen.last[:1] - pad,
        rows=_real(seen.rows) - pad,
        columns=_real(seen.columns) - pad,
        key_mask=None,
        rope=(cos, sin),
    )


def _real(x: Tensor) -> Tensor:
    """The first row of ``x [B, n]`` up to its padding."""
    return x[:1, : int((x[0] >= 0).sum())]
