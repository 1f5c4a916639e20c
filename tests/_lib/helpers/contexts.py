"""Contexts for policy tests, from the ones that ship in ``vlmprune.testing``, and slow ways to score them."""

from dataclasses import replace

import torch

from vlmprune.testing.context import make_case, with_text, with_vision

IMAGE = {"square": ((6, 6),), "tall": ((7, 3),), "two": ((4, 5), (5, 3)), "none": ()}


def named(images):
    """Grids per sample; a string names a layout of IMAGE."""
    return [IMAGE[i] if isinstance(i, str) else i for i in images]


def rope(x, cos, sin):
    """Rotate-half RoPE on ``[B, H, S, D]`` with ``[B, S, D]`` tables, written out pair by pair."""
    half = x.shape[-1] // 2
    out = torch.empty_like(x)
    for i in range(half):
        a, b = x[..., i], x[..., i + half]
        out[..., i] = a * cos[:, None, :, i] - b * sin[:, None, :, i]
        out[..., i + half] = b * cos[:, None, :, i + half] + a * sin[:, None, :, i + half]
    return out


def top(scores, count):
    """Positions of the ``count`` highest scores, ties to the lower position, ascending: plain Python."""
    order = sorted(range(len(scores)), key=lambda j: (-scores[j], j))
    return sorted(order[:count])


def kept_lists(index):
    """An index ``[B, K]`` as one list per sample, without padding."""
    return [[i for i in row if i >= 0] for row in index.tolist()]


def case(images=("square",), layer=2, last_only=False, **settings):
    """A context: see make_case. ``last_only`` leaves the last query row alone."""
    made = make_case(named(images), layer, **settings)
    if not last_only:
        return made
    seen = made.ctx.attention
    return replace(made, ctx=replace(made.ctx, attention=replace(seen, query=seen.query[:, :, -1:])))


def text_case(images, few_values=False, **settings):
    """A context with text rows and input embeddings: see make_case and with_text."""
    return with_text(make_case(named(images), few_values=few_values, **settings), few_values)


def sight(images=("square",), layers=(-2,), few_values=False, **tower):
    """A context at layer 0 with vision layers, features, embeddings and text: see with_vision."""
    made = with_text(make_case(named(images), 0, few_values=few_values))
    return with_vision(made, layers, few_values=few_values, **tower).ctx


def images_in(ctx):
    """Of every sample, its images as (number in the call, first place, grid)."""
    number = 0
    for grids in ctx.grids:
        here, first = [], 0
        for grid in grids:
            here.append((number, first, grid))
            number, first = number + 1, first + grid[0] * grid[1]
        yield here


def patch_scores(ctx, layer, image):
    """Slow CLS attention of image ``image`` (or the mean over all rows), head mean, in double precision."""
    seen = ctx.vision[layer]
    q, k = (t[image].double() for t in (seen.query, seen.key))
    total = 0
    for h in range(q.shape[0]):
        p = torch.softmax(q[h] @ k[h].T * seen.scale, 1)
        total = total + (p[0, 1:] if seen.cls else p.mean(0)) / q.shape[0]
    return [round(x, 12) for x in total.tolist()]


def attention_row(made, sample, row, head):
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
