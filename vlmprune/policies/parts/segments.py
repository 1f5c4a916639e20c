"""Where the segments of a video begin: at frames unlike the one before, by clusters of frames, or so that most can be merged."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from vlmprune.policies.choose import falling_places
from vlmprune.policies.parts.frames import over_runs, run_numbers


def unlike_frames(means: Tensor, threshold: float, segments: int) -> Tensor:
    """Where a frame's mean row ``[I, F, D]`` and that of the one before have a cosine below ``threshold``: ``[I, F]`` bool.

    And where it is least, until there are ``segments`` in all; the first frame begins one.
    """
    alike = cosine_similarity(means[:, 1:], means[:, :-1], dim=-1).nan_to_num(2.0)
    least = falling_places(-alike, torch.ones_like(alike, dtype=torch.bool)) < segments - 1
    first = torch.ones_like(means[:, :1, 0], dtype=torch.bool)
    return torch.cat([first, least | (alike < threshold)], 1)


def stretches(clusters: Tensor) -> Tensor:
    """Where segments begin, ``[I, F]`` bool, of frames in ``clusters [I, F]``.

    Of every cluster the longest stretches of frames stay, unless they are single frames. Frames in between join the longer
    of the stretches beside them, the one before if they are as long, as it has grown by then.
    """
    last = clusters.shape[1] - 1
    frames = torch.arange(last + 1, device=clusters.device)
    runs = run_numbers(clusters != clusters.roll(1, 1))
    length = over_runs(torch.ones_like(runs), runs).long().gather(1, runs)
    same = clusters[:, :, None] == clusters[:, None, :]
    longest = torch.where(same, length[:, None], 0).amax(2)
    stays = (length == longest) & (longest > 1)
    later = torch.where(stays, frames, last + 1).flip(1).cummin(1).values.flip(1).clamp(max=last)
    after = torch.where(stays.gather(1, later), length.gather(1, later), 0)
    label, grown = torch.zeros_like(clusters[:, 0]), torch.zeros_like(clusters[:, 0])
    joins, begins = label, list[Tensor]()
    for t in range(last + 1):
        opens = ~stays[:, t] & (stays[:, t - 1] if t else True)
        nearest = torch.where(grown >= after[:, t], label, clusters.gather(1, later[:, t, None])[:, 0])
        joins = torch.where(opens, nearest, joins)
        new = torch.where(stays[:, t], clusters[:, t], joins)
        begins.append(new != label)
        label, grown = new, torch.where(new == label, grown + 1, 1)
    return torch.stack(begins, 1)


def best_cuts(alike: Tensor, longest: int) -> Tensor:
    """Where segments of at most ``longest`` frames begin, ``[I, F]`` bool, so that the most tokens can be merged over time.

    A segment of W frames saves W - 1 times the places ``alike [I, F, P]`` (like the frame before) in all but its first frame.
    ``best[i]`` is what the first i frames save at most; of segments that save the same the last one is the shortest.
    """
    videos, F, _ = alike.shape
    frames = torch.arange(F, device=alike.device)
    broken = torch.where(alike, 0, frames[:, None]).cummax(1).values  # the last frame unlike the one before
    held = torch.stack([(broken <= first).sum(2) for first in range(F)], 1)  # [I, first, last]: places
    width = frames - frames[:, None]
    saved = (held * width).masked_fill((width < 0) | (width >= longest), -1)
    best, begin = alike.new_zeros(videos, F + 1, dtype=torch.int64), list[Tensor]()
    for last in range(F):
        here = saved[:, : last + 1, last]
        value = torch.where(here < 0, -1, best[:, : last + 1] + here).flip(1)
        best[:, last + 1] = value.amax(1)
        begin.append(last - value.argmax(1))
    starts, first = torch.stack(begin, 1), torch.full((videos, 1), F, device=alike.device)
    cut = torch.zeros(videos, F, dtype=torch.bool, device=alike.device)
    for _ in range(F):
        first = starts.gather(1, (first - 1).clamp(min=0))
        cut = cut.scatter(1, first, True)
    return cut
