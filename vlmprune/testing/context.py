"""Contexts to try a policy on, made from nothing but what it reads: no model, no image, fixed by a seed.

A sample's prompt is text, its images with a little text between them, and text again; batches are padded on the left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor

from vlmprune.policies.base import AttentionInputs, Grid, Needs, TokenContext, VisionAttention
from vlmprune.testing.context_changes import bare, with_wave
from vlmprune.testing.words import last_norm, with_tokens

PAST, BEFORE, BETWEEN, AFTER = 4, 3, 2, 5
"""Text tokens: of an earlier turn, before the images, after each image, after that one at the prompt's end."""
HEADS, HEAD_DIM, WIDTH, FEATURES = 4, 16, 8, 12
BASE = 100.0
"""Of the rotary angles: small, so that a short prompt turns far."""


@dataclass(frozen=True)
class Case:
    """A context and what it was made from.

    Attributes:
        ctx: the context; its query and key are rotated.
        query: ``[B, H, Q, D]`` before rotation.
        key: ``[B, Hkv, S, D]`` before rotation, S = past + Q.
        valid: ``[B, S]`` False = padding.
        image, text: int64 positions in the unpruned prompt of all visual tokens and of the text behind the last image,
            -1 = padding on the right.
    """

    ctx: TokenContext
    query: Tensor
    key: Tensor
    valid: Tensor
    image: Tensor
    text: Tensor


@dataclass(frozen=True)
class Sample:
    """One sample's prompt, some of whose visual tokens may be gone.

    Attributes:
        origin: the unpruned position of every row still there.
        columns: rows of the visual tokens still there.
        ordinals: their numbers among all visual tokens.
        image, text: unpruned positions of all visual tokens, and of the text behind the last image.
    """

    origin: list[int]
    columns: list[int]
    ordinals: list[int]
    image: list[int]
    text: list[int]


def lay_out(grids: Sequence[Grid], kept: Sequence[int] | None, before: int, after: int) -> Sample:
    """The prompt around these grids, of whose tokens an earlier stage left ``kept``; after = 0 ends it with its image."""
    made, position = Sample(list(range(before)), [], [], [], []), before
    for image, (rows, columns) in enumerate(grids, 1):
        for place in range(position, position + rows * columns):
            ordinal = len(made.image)
            if kept is None or ordinal in kept:
                made.columns.append(len(made.origin))
                made.ordinals.append(ordinal)
                made.origin.append(place)
            made.image.append(place)
        position += rows * columns
        gap = BETWEEN if after or image < len(grids) else 0
        made.origin.extend(range(position, position + gap))
        position += gap
    made.origin.extend(range(position, position + after))
    if grids and after:
        made.text.extend(range(position - BETWEEN, position + after))
    return made


def padded(rows: Sequence[Sequence[int]], left: bool = False) -> Tensor:
    """Ragged lists as int64 ``[B, longest]``, -1 = padding."""
    width = max(map(len, rows))
    pads = [[-1] * (width - len(row)) for row in rows]
    filled = [[*pad, *row] if left else [*row, *pad] for row, pad in zip(rows, pads, strict=True)]
    return torch.tensor(filled, dtype=torch.int64)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate-half RoPE on ``x [B, H, S, D]`` with tables ``[B, S, D]``."""
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    return x * cos[:, None] + turned * sin[:, None]


def tables(positions: Tensor, width: int, stretch: float = 1.0) -> tuple[Tensor, Tensor]:
    """cos and sin ``[B, S, width]`` of positions ``[B, S]``, times the factor that long-context models fold in."""
    angle = positions[..., None].float() * BASE ** (-torch.arange(0, width, 2) / width)
    angle = torch.cat([angle, angle], -1)
    return angle.cos() * stretch, angle.sin() * stretch


def draw(shape: Sequence[int], keys: int, few_values: bool, g: Generator) -> tuple[Tensor, Tensor]:
    """Queries ``[B, H, Q, D]`` and ``keys`` keys for half as many heads; few values: three distinct keys, so scores tie."""
    B, H, Q, D = shape
    if few_values:
        query = torch.randint(-1, 2, (B, H, Q, D), generator=g).float()
        key = torch.randint(-1, 2, (B, H // 2, 3, D), generator=g).float()
        return query, key[:, :, torch.randint(3, (keys,), generator=g)]
    return torch.randn(B, H, Q, D, generator=g), torch.randn(B, H // 2, keys, D, generator=g)


def make_case(
    images: Sequence[Sequence[Grid]],
    layer: int = 2,
    *,
    kept: Sequence[Sequence[int] | None] | None = None,
    past: bool = False,
    few_values: bool = False,
    stretch: float = 1.0,
    before: int = BEFORE,
    after: Sequence[int] | None = None,
    seed: int = 0,
    H: int = HEADS,
    D: int = HEAD_DIM,
) -> Case:
    """A context with hidden states and the query and key of every row.

    Args:
        images: per sample, the grids of its images.
        layer: the stage's layer.
        kept: per sample, the ordinals that earlier stages left; None = all.
        past: whether an earlier turn is in the cache.
        few_values: only three distinct keys, none rotated: equal keys score equally wherever they are.
        stretch: factor folded into the rotary tables.
        before: text tokens before the first image.
        after: per sample, text tokens at the prompt's end; 0 = the prompt ends with its image. None = AFTER.
        seed: which draw.
        H, D: query heads and their width; there are half as many key heads.
    """
    g = torch.Generator().manual_seed(seed)
    B, P = len(images), PAST if past else 0
    ends, left = after or [AFTER] * B, kept or [None] * B
    made = [lay_out(grids, k, before, a) for grids, k, a in zip(images, left, ends, strict=True)]
    origin = padded([sample.origin for sample in made], left=True)
    Q, S = origin.shape[1], P + origin.shape[1]
    query, key = draw((B, H, Q, D), S, few_values, g)
    at = torch.cat([torch.arange(P).expand(B, P), origin.clamp(min=0) + P], 1)
    cos, sin = tables(torch.zeros_like(at) if few_values else at, D, stretch)
    valid = torch.cat([torch.ones(B, P, dtype=torch.bool), origin >= 0], 1)
    first = [S - len(sample.origin) for sample in made]
    columns = padded([[c + f for c in sample.columns] for sample, f in zip(made, first, strict=True)])
    attention = AttentionInputs(
        query=rotate(query, cos[:, P:], sin[:, P:]),
        key=rotate(key, cos, sin),
        last=torch.full((B, 1), S - 1),
        rows=padded([list(range(f, S)) for f in first]),
        columns=columns,
        key_mask=None if valid.all() else valid,
        rope=(cos[:, P:], sin[:, P:]),
        scale=D**-0.5,
    )
    ctx = TokenContext(
        layer=layer,
        mask=columns >= 0,
        counts=tuple(len(sample.columns) for sample in made),
        ordinals=padded([sample.ordinals for sample in made]),
        positions=torch.where(columns >= 0, origin.gather(1, (columns - P).clamp(min=0)), -1),
        grids=tuple(tuple(grids) for grids in images),
        hidden=torch.randn(B, columns.shape[1], WIDTH, generator=g),
        earlier=torch.randn(B, columns.shape[1], WIDTH, generator=g),
        attention=attention,
    )
    image, text = (padded([getattr(sample, name) for sample in made]) for name in ("image", "text"))
    return Case(ctx, query, key, valid, image, text)


def with_text(made: Case, few_values: bool = False, seed: int = 1) -> Case:
    """The same with input embeddings, the text's states, where images and text are, and its rows in place of all rows."""
    g, attention = torch.Generator().manual_seed(seed), made.ctx.attention
    assert attention is not None
    S, B = made.key.shape[2], len(made.ctx.counts)
    # In the unpruned prompt, which is longer than the chunk that an earlier stage left.
    length = max(S, 1 + int(max(x.max() if x.numel() else 0 for x in (made.image, made.text))) + AFTER)
    embeds = torch.randn(B, length, WIDTH, generator=g)
    if few_values:  # three distinct embeddings: rows that match equally well tie exactly
        embeds = torch.randint(-1, 2, (B, length, 1), generator=g).float().repeat(1, 1, WIDTH)
    count = (made.text >= 0).sum(1, keepdim=True)
    rows = torch.arange(made.text.shape[1]) - count + S
    rows = torch.where(made.text >= 0, rows, -1)
    entering = torch.randn(B, made.text.shape[1], WIDTH, generator=g).masked_fill(rows[..., None] < 0, 0.0)
    ctx = replace(
        made.ctx,
        attention=replace(attention, rows=rows),
        image=made.image,
        text=made.text,
        words=tuple(count[:, 0].tolist()),
        embeds=embeds,
        text_hidden=entering,
        norm=last_norm,
        start=torch.zeros(B, 1, dtype=torch.int64),
    )
    return replace(made, ctx=ctx)


def with_vision(
    made: Case,
    layers: Sequence[int] = (-2,),
    *,
    cls: bool = True,
    side: int = 1,
    few_values: bool = False,
    seed: int = 1,
    H: int = HEADS - 1,
    D: int = WIDTH,
) -> Case:
    """The same with vision layers, features and a projector; every grid is an image, all have as many tokens.

    Args:
        made: a case at a policy's first stage.
        layers: which vision layers.
        cls: whether the tower has a CLS token.
        side: rows and columns of patches that become one visual token.
        few_values, seed, H, D: as in ``make_case``, for the tower.
    """
    g, grids = torch.Generator().manual_seed(seed), [grid for sample in made.ctx.grids for grid in sample]
    if not grids:
        return made
    rows, columns = grids[0]
    tokens, patches = rows * columns, rows * columns * side**2 + cls
    cells, seen = None if side == 1 else blocks(len(grids), rows, columns, side), {}
    for layer in layers:
        query, key = draw((len(grids), 2 * H, patches, D), patches, few_values, g)
        seen[layer] = VisionAttention(query[:, :H], key, D**-0.5, cls, cells=cells)
    values = Generator().manual_seed(
        seed + 1
    )  # a draw of their own: what else is drawn does not depend on them
    for layer, own in seen.items():
        _, value = draw((len(grids), 2 * H, patches, D), patches, few_values, values)
        seen[layer] = replace(own, value=value)
    features = torch.randn(len(grids), tokens, FEATURES, generator=g)
    weight = torch.randn(FEATURES, WIDTH, generator=g) / 4

    def project(x: Tensor) -> Tensor:
        return torch.tanh(x.float() @ weight)

    return replace(made, ctx=replace(made.ctx, vision=seen, features=features, project=project))


def blocks(crops: int, rows: int, columns: int, side: int) -> Tensor:
    """``[I, T, m]`` the patches of every token, where each is a block of ``side`` times ``side`` of its crop's."""
    patches = torch.arange(crops * rows * columns * side**2).view(crops, rows, side, columns, side)
    return patches.transpose(2, 3).reshape(crops, rows * columns, side**2)


def make_context(needs: Needs, images: Sequence[Sequence[Grid]], layer: int, **settings: Any) -> TokenContext:
    """A context with what ``needs`` asks for and nothing else; settings as in ``make_case``, and the tower's."""
    tower = {name: settings.pop(name) for name in ("cls", "side") if name in settings}
    few_values = settings.get("few_values", False)
    made = make_case(images, layer, **settings)
    if needs.reads_text:
        worded = with_text(made, few_values)
        rows_too = worded.ctx if needs.rows == "text" else replace(worded.ctx, attention=made.ctx.attention)
        made = replace(worded, ctx=rows_too)
    if needs.vision:
        made = with_vision(made, needs.vision, few_values=few_values, **tower)
    if needs.tokens:
        made = replace(made, ctx=with_tokens(made.ctx, made.image, made.text))
    return bare(with_wave(made.ctx) if needs.wave else made.ctx, needs)
