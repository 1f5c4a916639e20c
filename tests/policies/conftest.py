"""Contexts for policy tests, together with what they were made from: queries and keys BEFORE rotary embedding."""

from dataclasses import dataclass, replace

import pytest
import torch

from vlmprune.policies import AttentionInputs, TokenContext
from vlmprune.policies.base import VisionAttention

PAST_BEFORE, TEXT_BEFORE, TEXT_BETWEEN, TEXT_AFTER = 4, 3, 2, 5
IMAGE = {"square": ((6, 6),), "tall": ((7, 3),), "two": ((4, 5), (5, 3)), "none": ()}


@dataclass
class Case:
    """One context. ``query`` and ``key`` are not rotated; the context's are."""

    ctx: TokenContext
    query: torch.Tensor  # [B, H, Q, D]
    key: torch.Tensor  # [B, Hkv, P + Q, D]
    valid: torch.Tensor  # [B, P + Q]


def rotate(x, cos, sin):
    """Rotate-half RoPE on ``[B, H, S, D]`` with ``[B, S, D]`` tables, written out pair by pair."""
    half = x.shape[-1] // 2
    out = torch.empty_like(x)
    for i in range(half):
        a, b = x[..., i], x[..., i + half]
        out[..., i] = a * cos[:, None, :, i] - b * sin[:, None, :, i]
        out[..., i + half] = b * cos[:, None, :, i + half] + a * sin[:, None, :, i + half]
    return out


def tables(positions, D, stretch):
    """cos and sin ``[B, S, D]`` of the positions ``[B, S]``; ``stretch`` is the factor long-context models fold in."""
    angle = positions[..., None].float() * 100.0 ** (-torch.arange(0, D, 2) / D)
    angle = torch.cat([angle, angle], -1)
    return angle.cos() * stretch, angle.sin() * stretch


def chunk_of(grids, kept):
    """One sample's prompt chunk: its length, columns, ordinals and original positions of all its rows."""
    columns, ordinals, position, ordinal = [], [], TEXT_BEFORE, 0
    origin = list(range(TEXT_BEFORE))
    for rows, cols in grids:
        for _ in range(rows * cols):
            if kept is None or ordinal in kept:
                columns.append(len(origin))
                ordinals.append(ordinal)
                origin.append(position)
            position, ordinal = position + 1, ordinal + 1
        origin += range(position, position + TEXT_BETWEEN)
        position += TEXT_BETWEEN
    origin += range(position, position + TEXT_AFTER)
    return columns, ordinals, origin


def padded(rows, left=False):
    """Ragged lists as int64 ``[B, max]``, -1 = padding."""
    width = max(map(len, rows))
    pads = [[-1] * (width - len(r)) for r in rows]
    filled = [p + r if left else r + p for r, p in zip(rows, pads, strict=True)]
    return torch.tensor(filled, dtype=torch.int64)


def draw(B, H, Q, S, D, few_values, g):
    """Queries and, for half as many heads, keys; with few values only three distinct keys, so that scores tie."""
    if few_values:
        query = torch.randint(-1, 2, (B, H, Q, D), generator=g).float()
        key = torch.randint(-1, 2, (B, H // 2, 3, D), generator=g).float()
        return query, key[:, :, torch.randint(3, (S,), generator=g)]
    return torch.randn(B, H, Q, D, generator=g), torch.randn(B, H // 2, S, D, generator=g)


def make_case(
    images=("square",),
    layer=2,
    kept=None,
    past=False,
    few_values=False,
    stretch=1.0,
    last_only=False,
    seed=0,
    H=4,
    D=16,
):
    """A left-padded batch; ``images`` names one layout of IMAGE (or gives the grids) per sample.

    ``kept`` lists the ordinals that earlier stages left, per sample. ``few_values`` also rotates by nothing, so that
    equal keys score equally wherever they are.
    """
    g = torch.Generator().manual_seed(seed)
    grids = tuple(IMAGE[i] if isinstance(i, str) else i for i in images)
    kept = kept or [None] * len(grids)
    made = [chunk_of(gr, k) for gr, k in zip(grids, kept, strict=True)]
    B, Q, P = len(grids), max(len(m[2]) for m in made), PAST_BEFORE if past else 0
    S = P + Q
    query, key = draw(B, H, Q, S, D, few_values, g)
    origin = padded([m[2] for m in made], left=True)
    at = torch.cat([torch.arange(P).expand(B, P), origin.clamp(min=0) + P], 1)
    cos, sin = tables(torch.zeros_like(at) if few_values else at, D, stretch)
    valid = torch.cat([torch.ones(B, P, dtype=torch.bool), origin >= 0], 1)
    shift = [S - len(m[2]) for m in made]
    columns = padded([[c + s for c in m[0]] for m, s in zip(made, shift, strict=True)])
    rows = padded([list(range(s, S)) for s in shift])
    ordinals = padded([m[1] for m in made])
    rotated = rotate(query, cos[:, P:], sin[:, P:])
    positions = torch.where(columns >= 0, origin.gather(1, (columns - P).clamp(min=0)), -1)
    attention = AttentionInputs(
        query=rotated[:, :, -1:] if last_only else rotated,
        key=rotate(key, cos, sin),
        last=torch.full((B, 1), S - 1),
        rows=rows,
        columns=columns,
        key_mask=None if valid.all() else valid,
        rope=(cos[:, P:], sin[:, P:]),
        scale=D**-0.5,
    )
    counts = tuple(len(m[0]) for m in made)
    hidden = torch.randn(B, columns.shape[1], 8, generator=g)
    ctx = TokenContext(layer, columns >= 0, counts, ordinals, positions, grids, hidden, attention)
    return Case(ctx, query, key, valid)


def best(scores, count):
    """Positions of the ``count`` highest scores, ties to the lower position, ascending: plain Python."""
    order = sorted(range(len(scores)), key=lambda j: (-scores[j], j))
    return sorted(order[:count])


@pytest.fixture(scope="session")
def case():
    """Makes a context: see make_case."""
    return make_case


@pytest.fixture(scope="session")
def top():
    """Slow top-k: see best."""
    return best


@pytest.fixture(scope="session")
def kept_lists():
    """Turns an index ``[B, K]`` into one list per sample, without padding."""
    return lambda index: [[i for i in row if i >= 0] for row in index.tolist()]


@pytest.fixture(scope="session")
def rope():
    """The rotation the contexts were made with."""
    return rotate


@pytest.fixture(scope="session")
def sight():
    """Makes a case at layer 0 whose context has vision layers, features, embeddings and text: see make_sight."""
    return make_sight


def make_sight(images=("square",), layers=(-2,), cls=True, few_values=False, seed=0, H=3, D=8):
    """A case at layer 0 that also has seen the images, all of one size; with few values the scores tie."""
    ctx = make_case(images, layer=0, few_values=few_values, seed=seed).ctx
    g = torch.Generator().manual_seed(seed + 1)
    count, P = sum(map(len, ctx.grids)), max([r * c for grids in ctx.grids for r, c in grids], default=0)
    seen = {}
    for layer in layers if count else ():
        query, key = draw(count, 2 * H, P + cls, P + cls, D, few_values, g)
        seen[layer] = VisionAttention(query[:, :H], key, D**-0.5, cls)
    features = torch.randn(count, P, 12, generator=g)
    weight = torch.randn(12, ctx.hidden.shape[2], generator=g) / 4
    B, Q = len(ctx.grids), 40
    text = padded([torch.randperm(Q, generator=g)[: 3 + b].tolist() for b in range(B)])
    embeds = torch.randn(B, Q, 8, generator=g)
    features = features if count else None
    seen = dict(vision=seen, features=features, project=lambda x: torch.tanh(x.float() @ weight))
    return replace(ctx, **seen, embeds=embeds, text=text)


@pytest.fixture(scope="session")
def patch_scores():
    """Slow CLS attention of image ``image`` (or the mean over all rows), head mean, in double precision."""

    def score(ctx, layer, image):
        seen = ctx.vision[layer]
        q, k = (t[image].double() for t in (seen.query, seen.key))
        total = 0
        for h in range(q.shape[0]):
            p = torch.softmax(q[h] @ k[h].T * seen.scale, 1)
            total = total + (p[0, 1:] if seen.cls else p.mean(0)) / q.shape[0]
        return [round(x, 12) for x in total.tolist()]

    return score


@pytest.fixture(scope="session")
def images_in():
    """Of every sample, its images as (number in the call, first place, grid)."""

    def walk(ctx):
        number = 0
        for grids in ctx.grids:
            here, first = [], 0
            for grid in grids:
                here.append((number, first, grid))
                number, first = number + 1, first + grid[0] * grid[1]
            yield here

    return walk


def with_text(made, few_values=False, D=12, seed=1):
    """``made`` with input embeddings, the text after the last image, and its rows in place of all rows."""
    g, ctx = torch.Generator().manual_seed(seed), made.ctx
    S, text, image = made.key.shape[2], [], []
    for grids in ctx.grids:
        start, places = TEXT_BEFORE, []
        for rows, cols in grids:
            places += range(start, start + rows * cols)
            start += rows * cols + TEXT_BETWEEN
        image.append(places)
        end = TEXT_BEFORE + sum(rows * cols + TEXT_BETWEEN for rows, cols in grids)
        text.append(list(range(end - TEXT_BETWEEN, end + TEXT_AFTER)) if grids else [])
    longest = 1 + max([TEXT_BEFORE + TEXT_AFTER, *(position for row in text for position in row)])
    embeds = torch.randn(len(text), longest, D, generator=g)
    if few_values:  # three distinct embeddings: rows that match equally well tie exactly
        embeds = torch.randint(-1, 2, (*embeds.shape[:2], 1), generator=g).float().repeat(1, 1, D)
    rows = padded([list(range(S - len(row), S)) for row in text])
    attention = replace(ctx.attention, rows=rows)
    seen = dict(embeds=embeds, image=padded(image), text=padded(text))
    return replace(made, ctx=replace(ctx, attention=attention, **seen))


@pytest.fixture(scope="session")
def text_case():
    """Makes a context with text rows and input embeddings: see make_case and with_text."""

    def make(images, few_values=False, **settings):
        return with_text(make_case(images, few_values=few_values, **settings), few_values)

    return make


def received(made, sample, row, head):
    """Softmax over everything the key position ``row`` sees in one head, at the sample's visual columns: plain loops."""
    seen = made.ctx.attention
    first = seen.key.shape[2] - seen.query.shape[2]
    q = seen.query[sample, head, row - first].double()
    shared = seen.query.shape[1] // seen.key.shape[1]
    keys = seen.key[sample, head // shared].double()
    weight = {}
    for j in range(row + 1):
        if made.valid[sample, j]:
            weight[j] = float((q @ keys[j] * seen.scale).exp())
    total = sum(weight.values())
    return [weight[c] / total for c in seen.columns[sample].tolist() if c >= 0]


@pytest.fixture(scope="session")
def attention_row():
    """One row of an attention matrix: see received."""
    return received
