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
    toward_runs,
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
    of_frames, back, seen = torch.zeros_like(ctx.mask), torch.full_like(ctx.hidden, -5), 0
    for some in frames_of(ctx).alike:
        x, real = some.split(ctx.hidden), some.real(ctx.device)
        assert real.shape == x.shape[:3] and some.shape == x.shape[:2] and (x[~real] == 0).all()
        for i, t, places, sample in found(ctx, some):
            assert torch.equal(x[i, t, : len(places)], ctx.hidden[sample, places])
            assert real[i, t].tolist() == [p < len(places) for p in range(x.shape[2])]
            of_frames[sample, places] = True
            seen += 1
        some.put(back, x)
    assert seen == len(frames_of(ctx).grids)
    assert torch.equal(back[of_frames], ctx.hidden[of_frames]) and (back[~of_frames] == -5).all()


def found(ctx, some):
    """Every frame of these videos as (video, frame, its places, its sample)."""
    every = {}
    for number, (sample, image, t, places) in enumerate(each(ctx)):
        every[number] = sample, image, t, places
    for i, (image, own) in enumerate(zip(some.images, some.members(), strict=True)):
        for t, number in enumerate(own):
            sample, of, at, places = every[number]
            assert (of, at) == (image, t)
            yield i, t, places, sample


def test_a_long_video_widens_no_other():
    """What is worked on has a place for every token of a frame, and no more, where the frames of a video are of one shape."""
    ctx = videos([[[(2, 3)] * 9 + [NEWLINE], [(1, 2)]], [[(8, 8)]], [[(2, 3)] * 9, [(1, 2)] * 3]])
    parts = frames_of(ctx).alike
    assert [(part.shape, part.split(ctx.ordinals).shape[2]) for part in parts] == [
        ((2, 9), 6),
        ((1, 1), 2),
        ((1, 1), 64),
        ((1, 3), 2),
    ]
    assert all(part.real(ctx.device).all() for part in parts)


def test_what_belongs_to_frames(ctx):
    """Numbers and rows of all frames of the batch, taken for some videos and brought together again."""
    frames = frames_of(ctx)
    numbers = tuple(range(len(frames.grids)))
    rows = frames.groups.split(ctx.hidden)
    parts = frames.alike
    for some in parts:
        assert some.counts(numbers, ctx.device).flatten().tolist() == list(some.numbers)
        assert torch.equal(some.take(rows), some.split(ctx.hidden))
    back = frames.by_frame(parts, [v.split(ctx.ordinals) for v in parts])
    assert torch.equal(back, frames.groups.split(ctx.ordinals))
    assert frames.by_frame(parts, [v.counts(numbers, ctx.device) for v in parts]).tolist() == list(numbers)


def test_which_frame_stands_before(ctx):
    frames = frames_of(ctx)
    assert frames.before() == (-1, 0, 1, 2, -1, 4, -1, -1, -1, 8, -1)
    assert frames.before(2) == (-1, -1, 0, 1, -1, -1, -1, -1, -1, -1, -1)
    assert frames.before(9) == (-1,) * 11
    follows = [some.follows(ctx.device).int().tolist() for some in frames.alike]
    assert follows == [[[0, 1, 1, 1]], [[0, 1, 0]], [[0, 0, 1]], [[0]]]


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
    for some in frames_of(ctx).alike:
        got = frame_means(some.split(ctx.hidden), some.real(ctx.device))
        for i, t, places, sample in found(ctx, some):
            torch.testing.assert_close(got[i, t], ctx.hidden[sample, places].mean(0))


def test_runs():
    starts = torch.tensor([[False, True, False, False, True], [True, False, False, True, False]])
    runs = run_numbers(starts)
    assert runs.tolist() == [[0, 1, 1, 1, 2], [0, 0, 0, 1, 1]]
    x = torch.randn(2, 5, 3, 2, generator=torch.Generator().manual_seed(0))
    sums, there = over_runs(x, runs), torch.tensor([True, True, False])
    product = toward_runs(x, there.expand(2, 5, 3), runs)
    for i in range(2):
        for r in range(5):
            own = [x[i, t] for t in range(5) if runs[i, t] == r]
            torch.testing.assert_close(sums[i, r], sum(own, torch.zeros(3, 2)))
        for t in range(5):
            own = [x[i, f, :2].mean(0) for f in range(5) if runs[i, f] == runs[i, t]]
            torch.testing.assert_close(product[i, t], x[i, t] @ (sum(own) / len(own)))
    assert over_runs(torch.ones_like(runs), runs).tolist() == [[1, 3, 1, 0, 0], [3, 2, 0, 0, 0]]


def test_anchors_come_first(ctx):
    frames = frames_of(ctx)
    anchors = (0, 2, 4, 10)
    assert anchors_first(frames, anchors, (16, 3, 9, 9)) == (6, 2, 6, 2, 2, 1, 0, 3, 3, 3, 5)
    assert anchors_first(frames, anchors, (7, 1, 0, 2)) == (4, 0, 3, 0, 1, 0, 0, 0, 0, 0, 2)
    kept = anchors_first(frames, anchors, (16, 3, 9, 9))
    even = spread_evenly(frames, kept, ctx.device)
    assert (even >= 1).sum(1).tolist() == list(kept) and (even < 2 + 1e-6).all()


def test_without_images():
    frames = frames_of(videos([[], []]))
    assert frames.alike == () and frames.grids == () and frames.before() == ()
    assert spread_evenly(frames, (), torch.device("cpu")).shape == (0, 0)
