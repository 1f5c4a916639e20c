"""Videos for tests of policies, whose places change slowly; and density peaks, found slowly."""

from dataclasses import replace

import torch

from helpers.contexts import kept_lists, sight


def film(videos, grid=(3, 4), seed=0, cls=False, few=False, layers=(-1,), width=8, layer=0):
    """A context of layer 0 with ``videos[b]``, per sample the frames of each video; places stay alike now and then."""
    ctx = sight([tuple(grid for _ in range(sum(own))) for own in videos], layers=layers, cls=cls)
    P, g = grid[0] * grid[1], torch.Generator().manual_seed(seed)
    hidden = torch.zeros(*ctx.mask.shape, width)
    for b, own in enumerate(videos):
        first = 0
        for frames in own:
            rows = torch.randn(P, width, generator=g)
            for f in range(frames):
                fresh = torch.rand(P, 1, generator=g) < (0.6 if torch.rand(1, generator=g) < 0.3 else 0.1)
                rows = torch.where(fresh, torch.randn(P, width, generator=g), rows)
                drift = torch.rand(P, 1, generator=g) * torch.randn(P, width, generator=g)
                shown = rows.sign() if few else rows + 0.5 * drift
                hidden[b, first + f * P : first + (f + 1) * P] = shown
            first += frames * P
    sizes = tuple(tuple(n * P for n in own) for own in videos)
    return replace(ctx, hidden=hidden, sizes=sizes, layer=layer)


def clips(ctx):
    """Of every sample, its videos as (number of the first frame, first place, frames, tokens of a frame)."""
    number = 0
    for sizes, grids in zip(ctx.sizes, ctx.grids, strict=True):
        here, first = [], 0
        for n in sizes:
            P = grids[0][0] * grids[0][1]
            here.append((number, first, n // P, P))
            number, first = number + n // P, first + n
        yield here


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def cosine(a, b):
    size = (dot(a, a) * dot(b, b)) ** 0.5
    return dot(a, b) / size if size else 0.0


def mean(rows):
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def slow_peaks(rows, wanted, near):
    """Clusters of ``rows``: the centre of each, by its number. Plain loops; ties to the lower number."""
    n = len(rows)
    d = [[(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / len(a)) ** 0.5 for b in rows] for a in rows]
    near = max(1, min(near, n))
    spread = [round(sum(x * x for x in sorted(row)[:near]) / near, 9) for row in d]
    far, score = max(map(max, d)), []
    for i in range(n):
        denser = [d[i][j] for j in range(n) if (spread[j], j) < (spread[i], i)]
        gap = min(denser) if denser else far
        score.append(round(2.718281828459045 ** -spread[i] * gap, 9))
    centres = sorted(range(n), key=lambda i: (-score[i], i))[:wanted]
    if not centres:
        return [-1] * n
    return [i if i in centres else min(centres, key=lambda c: (round(d[i][c], 9), c)) for i in range(n)]


def in_turn(sizes, total):
    """``total`` shared out in proportion to sizes, what all up to one get rounded down."""
    done, gone, out = 0, 0, []
    for size in sizes:
        gone += size
        upto = gone * total // max(sum(sizes), 1)
        out.append(upto - done)
        done = upto
    return out


def check_merged(policy, ctx, want):
    """A choice of a video's tokens is that of ``want``, one dict of kept place to row a sample; who merged, merged into one kept."""
    got = policy.select(ctx)
    assert kept_lists(got.index) == [sorted(tokens) for tokens in want]
    for b, tokens in enumerate(want):
        rows = [tokens[i] for i in sorted(tokens)]
        if rows:
            torch.testing.assert_close(got.hidden[b, : len(rows)], torch.tensor(rows), atol=1e-5, rtol=1e-5)
        for i, target in enumerate(got.merged[b].tolist()):
            assert target == -1 or (target in tokens and i not in tokens)
    return got
