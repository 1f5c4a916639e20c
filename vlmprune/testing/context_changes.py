"""A context made different in one way: fewer samples, broken or repeated values, half the precision, no more than is asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vlmprune.policies.base import AttentionInputs, Needs, TokenContext, VisionAttention


def changed(ctx: TokenContext, change: Callable[[str, Tensor], Tensor]) -> TokenContext:
    """The same context with ``change(name, x)`` in place of every input ``x [B or images, ..., tokens, width]``."""

    def among(holder: Any, names: Sequence[str], prefix: str = "") -> Any:
        inputs = {name: getattr(holder, name) for name in names}
        return replace(holder, **{n: change(prefix + n, x) for n, x in inputs.items() if x is not None})

    pair = ("query", "key")
    ctx = among(ctx, ("hidden", "earlier", "text_hidden", "embeds", "features"))
    attention = None if ctx.attention is None else among(ctx.attention, pair)
    vision = {layer: among(seen, (*pair, "value"), f"vision[{layer}].") for layer, seen in ctx.vision.items()}
    return replace(ctx, attention=attention, vision=vision)


def inputs_of(ctx: TokenContext) -> dict[str, Tensor]:
    """Every tensor of numbers in a context, by the name that ``changed`` gives it."""
    found: dict[str, Tensor] = {}
    changed(ctx, found.setdefault)
    return found


def by_image(name: str) -> bool:
    """Whether an input's first dimension counts images, not samples."""
    return name == "features" or name.startswith("vision")


def copied(ctx: TokenContext) -> TokenContext:
    """The same values in other memory, where a policy writes without harm."""
    mask, ordinals, positions = (x.clone() for x in (ctx.mask, ctx.ordinals, ctx.positions))
    return replace(changed(ctx, lambda _, x: x.clone()), mask=mask, ordinals=ordinals, positions=positions)


def repeated(ctx: TokenContext, distinct: int) -> TokenContext:
    """Every input with so many distinct tokens, in turn."""
    return changed(ctx, lambda _, x: x[..., torch.arange(x.shape[-2]) % distinct, :])


def halved(ctx: TokenContext, dtype: torch.dtype) -> TokenContext:
    """Every input and the rotary tables in another precision."""
    ctx = changed(ctx, lambda _, x: x.to(dtype))
    if ctx.attention is None:
        return ctx
    cos, sin = ctx.attention.rope
    return replace(ctx, attention=replace(ctx.attention, rope=(cos.to(dtype), sin.to(dtype))))


def broken(ctx: TokenContext, sample: int, value: float, name: str | None = None) -> TokenContext:
    """One sample's inputs hold ``value``: one token of the input ``name``, or with None all tokens of all inputs."""
    first = sum(map(len, ctx.grids[:sample]))
    images = slice(first, first + len(ctx.grids[sample]))

    def spoil(key: str, x: Tensor) -> Tensor:
        if name not in (None, key):
            return x
        x = x.clone()
        part = x[images if by_image(key) else slice(sample, sample + 1)]
        part[..., slice(None) if name is None else _one_token(ctx, key, sample, part), :] = value
        return x

    return changed(ctx, spoil)


def _one_token(ctx: TokenContext, name: str, sample: int, x: Tensor) -> int:
    """Of one sample's input, a token that counts: a visual one, or the last query row."""
    if name == "key" and ctx.attention is not None:
        return int(ctx.attention.columns[sample, 0])
    if name == "embeds" and ctx.image is not None:
        return int(ctx.image[sample, 0])
    return 0 if name in ("hidden", "earlier", "text_hidden", "features") else x.shape[-2] - 1


def with_other_values(ctx: TokenContext) -> TokenContext:
    """As many tokens in tensors of the same shapes, with other values; after an earlier stage they are others of the image's."""
    last = torch.tensor([[sum(sizes) - 1] for sizes in ctx.images()])
    others = (
        torch.where(ctx.mask, last - ctx.ordinals, last + 1).sort(dim=1).values
    )  # padding stays on the right
    shift = torch.where(ctx.mask, others - ctx.ordinals, 0)
    ctx = changed(ctx, lambda _, x: x.flip(-2) * 0.5 + 0.25)
    return ctx if ctx.whole else replace(ctx, ordinals=ctx.ordinals + shift, positions=ctx.positions + shift)


def with_wave(ctx: TokenContext) -> TokenContext:
    """The same where every fifth token has run through the layers before, and the others have not."""
    assert ctx.attention is not None
    numbers = torch.arange(0, max(ctx.counts), 5, device=ctx.device)
    ran = torch.where(numbers < torch.tensor(ctx.counts, device=ctx.device)[:, None], numbers, -1)
    at = ctx.attention.columns.gather(1, ran.clamp(min=0)) if ran.shape[1] else ran
    attention = replace(ctx.attention, columns=torch.where(ran >= 0, at, -1))
    return replace(
        ctx, ran=ran, ran_counts=tuple(len(range(0, n, 5)) for n in ctx.counts), attention=attention
    )


def first_alone(ctx: TokenContext) -> TokenContext:
    """The first sample of a batch without an earlier turn, cut out and rid of all padding."""
    n, images = ctx.counts[0], len(ctx.grids[0])
    ctx = changed(ctx, lambda name, x: x[: images if by_image(name) else 1])
    text = None if ctx.text is None else _real(ctx.text)
    words = 0 if text is None else text.shape[1]
    return replace(
        ctx,
        counts=ctx.counts[:1],
        grids=ctx.grids[:1],
        sizes=None if ctx.sizes is None else ctx.sizes[:1],
        mask=ctx.mask[:1, :n],
        ordinals=ctx.ordinals[:1, :n],
        positions=ctx.positions[:1, :n],
        hidden=None if ctx.hidden is None else ctx.hidden[:, :n],
        earlier=None if ctx.earlier is None else ctx.earlier[:, :n],
        attention=None if ctx.attention is None else _first_rows(ctx.attention),
        ran=None if ctx.ran is None else _real(ctx.ran),
        ran_counts=None if ctx.ran_counts is None else ctx.ran_counts[:1],
        image=None if ctx.image is None else _real(ctx.image),
        text=text,
        words=None if ctx.words is None else ctx.words[:1],
        text_hidden=None if ctx.text_hidden is None else ctx.text_hidden[:, :words],
        start=None if ctx.start is None else ctx.start[:1],
        tokens=None if ctx.tokens is None else _real(ctx.tokens),
    )


def _first_rows(seen: AttentionInputs) -> AttentionInputs:
    """The first sample's query and key without the padding to the left of its prompt."""
    pad = 0 if seen.key_mask is None else int((~seen.key_mask[0]).sum())
    real = seen.key.shape[2] - pad
    cos, sin = (t[:1, pad:] for t in seen.rope)
    return replace(
        seen,
        query=seen.query[:, :, -real:],
        key=seen.key[:, :, pad:],
        last=seen.last[:1] - pad,
        rows=_real(seen.rows) - pad,
        columns=_real(seen.columns) - pad,
        key_mask=None,
        rope=(cos, sin),
    )


def _real(x: Tensor) -> Tensor:
    """The first row of ``x [B, n]`` up to its padding."""
    return x[:1, : int((x[0] >= 0).sum())]


def bare(ctx: TokenContext, needs: Needs) -> TokenContext:
    """The same with what ``needs`` asks for and nothing else, as the wiring hands it out."""
    assert ctx.hidden is not None and ctx.earlier is not None
    attention = ctx.attention if needs.attention else None
    if attention is not None and needs.rows == "last":
        attention = replace(attention, query=attention.query[:, :, -1:], rows=attention.last)
    if attention is not None and needs.rows == "text":  # queries from the first text row on
        S, rows = attention.key.shape[2], attention.rows
        reach = int(torch.where(rows >= 0, S - rows, 0).max()) if rows.numel() else 0
        attention = replace(attention, query=attention.query[:, :, attention.query.shape[2] - reach :])
    outside = ~ctx.mask[..., None]
    return replace(
        ctx,
        hidden=ctx.hidden.masked_fill(outside, 0.0) if needs.hidden else None,
        earlier=ctx.earlier.masked_fill(outside, 0.0) if needs.earlier else None,
        attention=attention,
        embeds=ctx.embeds if needs.embeds else None,
        image=ctx.image if needs.embeds else None,
        text=ctx.text if needs.reads_text else None,
        words=ctx.words if needs.reads_text else None,
        text_hidden=ctx.text_hidden if needs.text else None,
        norm=ctx.norm if needs.text else None,
        start=ctx.start if needs.text else None,
        vision={layer: _seen(ctx.vision[layer], needs) for layer in needs.vision if layer in ctx.vision},
        features=ctx.features if needs.vision else None,
        project=ctx.project if needs.vision else None,
        tokens=ctx.tokens if needs.tokens else None,
        embed=ctx.embed if needs.tokens else None,
        tokenizer=ctx.tokenizer if needs.tokens else None,
    )


def _seen(vision: VisionAttention, needs: Needs) -> VisionAttention:
    return vision if needs.values else replace(vision, value=None)
