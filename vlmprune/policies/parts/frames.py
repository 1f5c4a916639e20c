"""A batch's videos frame by frame: a frame against the one before it, those alike cut out as ``[I, F, P]``, runs of frames."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, pad
from torch.nn.utils.rnn import pad_sequence

from vlmprune import ops
from vlmprune.constants import filled, remembered, whole_numbers
from vlmprune.policies.base import Grid, TokenContext
from vlmprune.policies.counts import even_shares
from vlmprune.policies.crops import crops_of
from vlmprune.policies.groups import Counts, Groups, places_of, real_places
from vlmprune.policies.parts.lattice import grid_scores


@dataclass(frozen=True)
class Frames:
    """The G frames of the images and videos of a batch.

    What the tower sees as one image is a frame: a video's frame (a pair of them in Qwen-VL), and also the small view or a tile
    of an image that is cut up, in their order; any other image is a video of one frame. A newline token is of none.

    Attributes:
        groups: the same frames as ``crops_of`` gives them.
    """

    groups: Groups

    @cached_property
    def grids(self) -> tuple[Grid, ...]:
        """Rows and columns of each of the G frames."""
        return tuple((crop.rows, crop.columns) for crop in self.groups.crops)

    def before(self, steps: int = 1) -> Counts:
        """Of each of the G frames, which one (of the G) stands so many before it in its video; -1 = none of its shape."""
        out = []
        for own in self.groups.members:
            earlier = zip((*[-1] * min(steps, len(own)), *own), own, strict=False)
            out += [e if e >= 0 and self.grids[e] == self.grids[g] else -1 for e, g in earlier]
        return tuple(out)

    def same_place(self, others: Counts, device: torch.device) -> Tensor:
        """``[B, N]`` int64 the token in each one's place in another frame of its sample, ``others[g]`` for the g-th; -1 = none."""
        return _same_place(self.groups, others, device)

    @cached_property
    def alike(self) -> tuple[Videos, ...]:
        """The images and videos, those together that have as many frames of the same shapes: a long one widens no other.

        What follows is launched once for each shape, which a batch of many of them feels.
        """
        found: dict[tuple[Grid, ...], list[int]] = {}
        for image, own in enumerate(self.groups.members):
            if own:
                found.setdefault(tuple(self.grids[g] for g in own), []).append(image)
        return tuple(Videos.of(self.groups, tuple(images)) for images in found.values())

    def by_frame(self, parts: Sequence[Videos], found: Sequence[Tensor]) -> Tensor:
        """What was found for all of the ``alike`` ones, each ``[I, F]`` or ``[I, F, P]``, as ``[G]`` or ``[G, T]``.

        There are zeros behind a smaller frame's tokens.
        """
        order = [g for videos in parts for g in videos.numbers]
        back = tuple(sorted(range(len(order)), key=order.__getitem__))
        rows = [x.flatten(0, 1) for x in found]
        if rows[0].ndim == 2:
            most = max(x.shape[1] for x in rows)
            rows = [pad(x, (0, most - x.shape[1])) for x in rows]
        return torch.cat(rows)[whole_numbers(back, rows[0].device)]


@dataclass(frozen=True)
class Videos:
    """I images and videos of F frames each, whose shapes are the same: at most P tokens in one.

    Attributes:
        groups: their frames.
        images: which of the batch's images these are.
        numbers: which of the batch's G frames theirs are, video by video.
    """

    groups: Groups
    images: Counts
    numbers: Counts

    @classmethod
    def of(cls, groups: Groups, images: Counts) -> Self:
        """Some of the images of a batch."""
        numbers = tuple(g for image in images for g in groups.members[image])
        some = replace(
            groups,
            crops=tuple(groups.crops[g] for g in numbers),
            samples=tuple(groups.samples[g] for g in numbers),
            images=tuple(i for i, image in enumerate(images) for _ in groups.members[image]),
            rest=tuple(groups.rest[image] for image in images),
            owners=tuple(groups.owners[image] for image in images),
        )
        return cls(some, images, numbers)

    def members(self) -> Iterator[Counts]:
        """Of each of the I videos, which of the batch's frames are its."""
        some, frames = self.shape
        return (self.numbers[i * frames : (i + 1) * frames] for i in range(some))

    @property
    def shape(self) -> tuple[int, int]:
        """I and F."""
        return len(self.groups.owners), len(self.numbers) // len(self.groups.owners)

    def split(self, x: Tensor) -> Tensor:
        """Cut ``x [B, N, ...]`` into frames ``[I, F, P, ...]``; zeros where a frame is smaller than another."""
        own = self.groups.split(x)
        return own.reshape(*self.shape, *own.shape[1:])

    def take(self, x: Tensor) -> Tensor:
        """Theirs of ``x [G, T, ...]``, what the tokens of all frames of the batch have: ``[I, F, P, ...]``."""
        own = x if len(x) == len(self.numbers) else x[whole_numbers(self.numbers, x.device)]
        return own[:, : max(self.groups.tokens)].reshape(*self.shape, -1, *x.shape[2:])

    def counts(self, of_frames: Counts, device: torch.device) -> Tensor:
        """``[I, F]`` int64, theirs of one number for each of the G frames."""
        return whole_numbers(tuple(of_frames[g] for g in self.numbers), device).view(self.shape)

    def real(self, device: torch.device) -> Tensor:
        """``[I, F, P]`` bool, False behind the tokens of a frame that is smaller than another."""
        there = self.groups.padding(device)
        if there is None:
            there = filled((len(self.numbers), self.groups.tokens[0]), True, torch.bool, device)
        return there.view(*self.shape, -1)

    def follows(self, device: torch.device) -> Tensor:
        """``[I, F]`` bool, True where the frame before is of the same shape, so that places can be compared."""
        return whole_numbers(Frames(self.groups).before(), device).view(self.shape) >= 0

    def put(self, into: Tensor, x: Tensor) -> None:
        """Write ``x [I, F, P, ...]`` in its tokens' places of ``into [B, N, ...]``."""
        at, own = real_places(self.groups, x.device)
        rows = x.flatten(0, 2)
        rows = rows if len(rows) == len(own) else rows[own]
        into.view(-1, *into.shape[2:]).index_copy_(0, at, rows.to(into.dtype))


def frames_of(ctx: TokenContext) -> Frames:
    """Where the frames lie. Raises InputError if an earlier stage or chunked prefill left a part of their tokens.

    Example:
        >>> [videos.split(ctx.ordinals).shape for videos in frames_of(ctx).alike]  # three images of four tokens
        [torch.Size([3, 1, 4])]
    """
    return Frames(crops_of(ctx))


def cosine_at(x: Tensor, other: Tensor) -> Tensor:
    """Cosine of every token of ``x [B, N, D]`` with that in the place ``other [B, N]`` of its sample: ``[B, N]`` float32.

    -1 where ``other`` is below 0. A row of zeros has cosine 0.
    """
    return cosine_similarity(x.float(), ops.gather_tokens([x], other)[0].float(), dim=-1).masked_fill(
        other < 0, -1.0
    )


def frame_means(x: Tensor, real: Tensor) -> Tensor:
    """Mean row of every frame of ``x [I, F, P, D]``, over the tokens that are ``real [I, F, P]``: ``[I, F, D]`` float32."""
    total = x.float().masked_fill(~real[..., None], 0.0).sum(2)
    return total / real.sum(2).clamp(min=1)[..., None]


def run_numbers(starts: Tensor) -> Tensor:
    """Which run (segment) of its video each frame is in, from 0: ``[I, F]`` int64.

    ``starts [I, F]`` bool says where a new run begins; the first frame begins one in any case.

    Example:
        >>> run_numbers(torch.tensor([[False, False, True]]))
        tensor([[0, 0, 1]])
    """
    later = starts[:, 1:].long()
    return torch.cat([later.new_zeros(len(later), 1), later], 1).cumsum(1)


def over_runs(x: Tensor, runs: Tensor) -> Tensor:
    """Sums of ``x [I, F, ...]`` over the frames of each run, ``runs [I, F]`` as ``run_numbers`` gives: ``[I, F, ...]`` float32.

    Row r is that of run r, zeros where a video has fewer runs. A mean is this over ``over_runs`` of ones. The order of
    summing depends on shapes alone.

    Example:
        >>> over_runs(torch.tensor([[1.0, 2, 4]]), torch.tensor([[0, 0, 1]]))
        tensor([[3., 4., 0.]])
    """
    rows = x.float().reshape(*runs.shape, x[0, 0].numel() if runs.numel() else 0)
    of = runs[:, None, :] == torch.arange(runs.shape[1], device=runs.device)[:, None]
    return (of.float() @ rows).view(x.shape)


def toward_runs(x: Tensor, real: Tensor, runs: Tensor) -> Tensor:
    """Product of each row of ``x [I, F, P, D]`` with the mean of the mean rows of its run's frames: ``[I, F, P]`` float32."""
    means = (
        over_runs(frame_means(x, real), runs) / over_runs(torch.ones_like(runs), runs).clamp(min=1)[..., None]
    )
    return (x.float() @ means.gather(1, runs[..., None].expand_as(means))[..., None])[..., 0]


def anchors_first(frames: Frames, anchors: Counts, budgets: Counts) -> Counts:
    """How many tokens of each of the G frames stay, where those of the frames ``anchors`` come before all others.

    The anchors share each image's budget evenly, and what they cannot take the other frames.

    Example:
        >>> anchors_first(frames_of(ctx), (1,), [3, 6, 2])
        (3, 4, 2)
    """
    kept = [0] * len(frames.grids)
    for own, budget in zip(frames.groups.members, budgets, strict=True):
        for some in ([g for g in own if g in anchors], [g for g in own if g not in anchors]):
            sizes = [frames.groups.tokens[g] for g in some]
            shares = even_shares(min(budget, sum(sizes)), sizes)
            budget -= sum(shares)
            for g, share in zip(some, shares, strict=True):
                kept[g] = share
    return tuple(kept)


def spread_evenly(frames: Frames, kept: Counts, device: torch.device) -> Tensor:
    """Scores ``[G, P]`` float32, at most 2, whose best ``kept[g]`` of the g-th frame lie evenly over it: those are >= 1."""
    return _even(frames.grids, kept, device)


@remembered()
def _even(grids: tuple[Grid, ...], kept: Counts, device: torch.device) -> Tensor:
    """``[G, P]``, zeros behind a smaller frame's tokens."""
    rows = [grid_scores(grid, k) for grid, k in zip(grids, kept, strict=True)]
    return (pad_sequence(rows, batch_first=True) if rows else torch.zeros(0, 0)).to(device)


@remembered()
def _same_place(groups: Groups, others: Counts, device: torch.device) -> Tensor:
    out = torch.full((groups.batch, groups.width), -1, dtype=torch.int64)
    for crop, other, sample in zip(groups.crops, others, groups.samples, strict=True):
        if other >= 0:
            out[sample, places_of(crop)] = torch.tensor(places_of(groups.crops[other]))
    return out.to(device)
