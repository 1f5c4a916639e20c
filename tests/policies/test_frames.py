"""Frames of videos against loops over places: cut out and put back, compared with earlier ones, summed over runs."""

import math

import pytest
import torch

from helpers.videos import NEWLINE, frames_of_images, videos
from vlmprune.policies.parts.frames import (
    anchors_first,
    cosine_at,
    frame_means,
    frames_of,
    over_runs,
    run_numbers,
    spread_evenly,
)

BATCH = [
    [[(2, 3)] * 4 + [NEWLINE], [(1, 2), (1, 2), (2, 1)]],
    [],
    [[(3, 3), NEWLINE, (2, 2), (2, 2)], [(5, 1)]],
]
"""Two videos, of which one changes shape; none; an image that is cut up, and one that is not."""


@pytest.fixture
def ctx():
    return videos(BATCH)


def each(ctx):
    """Image, frame, and the frame's places, of the whole batch."""
    image = 0
    for sample, images in enumerate(frames_of_images(ctx)):
        for own, _, _ in images:
            for t, places in enumerate(own):
                yield sample, image, t, places
            image += 1


def test_cut_out_and_put_back(ctx):
    frames = frames_of(ctx)
    assert frames.counts == (4, 3, 3, 1) and frames.most == 4
    x, real = frames.split(ctx.hidden), frames.real(ctx.device)
    assert x.shape == (4, 4, 9, 8) and frames.there(ctx.device).sum() == 11
    back = frames.spread(x, fill=-5)
    of_frames = torch.zeros_like(ctx.mask)
    for sample, image, t, places in each(ctx):
        assert torch.equal(x[image, t, : len(places)], ctx.hidden[sample, places])
        assert real[image, t].tolist() == [p < len(places) for p in range(9)]
        assert torch.equal(back[sample, places], ctx.hidden[sample, places])
        of_frames[sample, places] = True
    assert (x[~real] == 0).all() and (back[~of_frames] == -5).all()
    assert torch.equal(frames.lay(frames.flat(x)), x)


def test_which_frame_stands_before(ctx):
    frames = frames_of(ctx)
    assert frames.before() == (-1, 0, 1, 2, -1, 4, -1, -1, -1, 8, -1)
    assert frames.before(2) == (-1, -1, 0, 1, -1, -1, -1, -1, -1, -1, -1)
    assert frames.before(9) == (-1,) * 11
    assert frames.follows(ctx.device).int().tolist() == [[0, 1, 1, 1], [0, 1, 0, 0], [0, 0, 1, 0], [0] * 4]


def test_cosines(ctx):
    frames = frames_of(ctx)
    got, earlier = cosine_at(ctx.hidden, frames.same_place(frames.before(), ctx.device)), None
    for sample, image, t, places in each(ctx):
        rows = ctx.hidden[sample, places].double()
        if t and (image, t) not in ((1, 2), (2, 1)):
            want = [
                float(a @ b / math.sqrt(a @ a) / math.sqrt(b @ b)) for a, b in zip(rows, earlier, strict=True)
            ]
            torch.testing.assert_close(
                got[sample, places].double(), torch.tensor(want).double().to(got.device)
            )
        else:
            assert (got[sample, places] == -1).all()
        earlier = rows


def test_means(ctx):
    frames = frames_of(ctx)
    got = frame_means(frames.split(ctx.hidden), frames.real(ctx.device))
    for sample, image, t, places in each(ctx):
        torch.testing.assert_close(got[image, t], ctx.hidden[sample, places].mean(0))
    assert (got[~frames.there(ctx.device)] == 0).all()


def test_runs():
    there = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    starts = torch.tensor([[False, True, False, False, True], [True, False, True, True, False]])
    runs = run_numbers(starts, there)
    assert runs.tolist() == [[0, 1, 1, 1, 2], [0, 0, 1, -1, -1]]
    x = torch.randn(2, 5, 3, 2, generator=torch.Generator().manual_seed(0)) * there[:, :, None, None]
    sums = over_runs(x, runs)
    for i in range(2):
        for r in range(5):
            torch.testing.assert_close(
                sums[i, r], sum((x[i, t] for t in range(5) if runs[i, t] == r), torch.zeros(3, 2))
            )
    assert over_runs(there, runs).tolist() == [[1, 3, 1, 0, 0], [2, 1, 0, 0, 0]]


def test_anchors_come_first(ctx):
    frames = frames_of(ctx)
    anchors = (0, 2, 4, 10)
    assert anchors_first(frames, anchors, (16, 3, 9, 9)) == (6, 2, 6, 2, 2, 1, 0, 3, 3, 3, 5)
    assert anchors_first(frames, anchors, (7, 1, 0, 2)) == (4, 0, 3, 0, 1, 0, 0, 0, 0, 0, 2)
    kept = anchors_first(frames, anchors, (16, 3, 9, 9))
    even = frames.flat(spread_evenly(frames, kept, ctx.device))
    assert (even >= 1).sum(1).tolist() == list(kept) and (even < 2 + 1e-6).all()


def test_without_images():
    ctx = videos([[], []])
    frames = frames_of(ctx)
    x = frames.split(ctx.hidden)
    assert frames.counts == () and frames.most == 0 and x.shape[:3] == (0, 0, 0)
    assert frames.spread(x).shape == ctx.hidden.shape
    runs = run_numbers(frames.follows(ctx.device), frames.there(ctx.device))
    assert over_runs(x, runs).shape == x.shape
    assert spread_evenly(frames, (), ctx.device).shape == (0, 0, 0)
