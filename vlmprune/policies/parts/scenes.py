"""Runs of a video's frames in which some places stand still: what is merged over time, what moves, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlmprune import ops
from vlmprune.constants import filled, whole_numbers
from vlmprune.policies.base import Positions, PruningPolicy, Reduction, TokenContext
from vlmprune.policies.by_image import quota_of
from vlmprune.policies.choose import index_of, select_counts
from vlmprune.policies.groups import Quota
from vlmprune.policies.parts.frames import Frames, Videos, frame_means, over_runs, run_numbers
from vlmprune.policies.parts.peaks import NEAR, density_peaks, in_proportion, means_of
from vlmprune.policies.parts.segments import stretches


@dataclass(frozen=True)
class Scene:
    """The runs of I videos, and the tokens ``[I, F, P]`` of each that stand still (one place in all frames of a run).

    Attributes:
        starts: ``[I, F]`` bool, where a run begins.
        runs: ``[I, F]``, as ``run_numbers`` gives them.
        still: ``[I, F, P]`` bool; of a run of one frame none are.
        real: ``[I, F, P]`` bool.
    """

    starts: Tensor
    runs: Tensor
    still: Tensor
    real: Tensor

    @classmethod
    def unchanging(cls, starts: Tensor, alike: Tensor, real: Tensor) -> Self:
        """Still are the places that are ``alike [I, F, P]``, the same as in the frame before, in all of a run but its first."""
        runs = run_numbers(starts)
        moved = over_runs((real & ~alike & ~starts[..., None]).float(), runs)
        return cls._where(moved == 0, starts, runs, real)

    @classmethod
    def similar(cls, videos: Videos, x: Tensor, share: float, tau: float) -> Self:
        """Of runs by clusters of frames: still are places whose tokens have a mean cosine, of all pairs, above ``tau``.

        Mean rows of the F frames of ``x [I, F, P, D]`` are clustered around ``int(share F)`` density peaks, one at least; of a
        cluster its longest ``stretches`` stay. Frames of another shape begin a run.
        """
        (some, frames), real = videos.shape, videos.real(x.device)
        means, there = frame_means(x, real), filled((some, frames), True, torch.bool, x.device)
        wanted = filled((some,), max(1, int(frames * share)), torch.int64, x.device)
        clusters = density_peaks(means, there, wanted, torch.full_like(wanted, NEAR), NEAR)
        starts = stretches(clusters) | ~videos.follows(x.device)
        runs = run_numbers(starts)
        length = over_runs(torch.ones_like(runs), runs)
        total = over_runs(normalize(x.float(), dim=-1), runs).square().sum(-1)
        alike = (total - length[..., None]) / (length * (length - 1)).clamp(min=1)[..., None]
        return cls._where(alike > tau, starts, runs, real)

    @classmethod
    def _where(cls, calm: Tensor, starts: Tensor, runs: Tensor, real: Tensor) -> Self:
        """Of the places that are calm in each run, ``[I, runs, P]``."""
        calm = calm & (over_runs(torch.ones_like(runs), runs) > 1)[..., None]
        return cls(starts, runs, calm.gather(1, runs[..., None].expand_as(calm)) & real, real)

    @property
    def lead(self) -> Tensor:
        """The still tokens of each run's first frame, which stand for those of the others."""
        return self.still & self.starts[..., None]

    @property
    def moving(self) -> Tensor:
        """The tokens that do not stand still."""
        return self.real & ~self.still

    @property
    def sizes(self) -> Tensor:
        """``[I, 2 F]`` int64: of each frame in turn the lead tokens and the moving ones, which is all that is distinct."""
        return torch.stack([self.lead.sum(2), self.moving.sum(2)], 2).flatten(1)

    def first_frames(self) -> Tensor:
        """``[I, F]`` int64 the first frame of each frame's run."""
        frames = torch.arange(self.starts.shape[1], device=self.starts.device)
        return torch.where(self.starts, frames, 0).cummax(1).values

    def shared_out(self, totals: Tensor) -> tuple[Tensor, Tensor]:
        """``totals [I]`` shared out in proportion over lead and moving tokens of every frame: ``[I, F, 2]``.

        Where less is distinct, the first of the other still tokens stay beside them: ``[I, F, P]`` bool.
        """
        sizes = self.sizes
        distinct = torch.minimum(totals, sizes.sum(1))
        others = (self.still & ~self.starts[..., None]).flatten(1)
        more = others & (others.cumsum(1) <= (totals - distinct)[:, None])
        return in_proportion(sizes, distinct).view(len(sizes), -1, 2), more.view(self.still.shape)

    def parts(self, ratio: float, whole: int) -> tuple[Tensor, Tensor]:
        """The same, ``ratio`` of the lead and of the moving tokens of each frame where they are more than ``whole``, else all."""
        some = torch.where(self.sizes > whole, (self.sizes.double() * ratio).long(), self.sizes)
        return some.view(len(some), -1, 2), torch.zeros_like(self.still)

    def clustered(self, x: Tensor, shares: Tensor, more: Tensor) -> Merged:
        """Lead and moving tokens of each frame become means around density peaks, ``shares [I, F, 2]`` of them; ``more`` stay."""
        means, near = self.over_time(x, more), torch.full_like(shares[..., 0], NEAR)
        each = zip((self.lead, self.moving), shares.unbind(2), strict=True)
        joined = torch.maximum(*(density_peaks(means, of, n, near, NEAR) for of, n in each))
        rows = torch.where(more[..., None], x.float(), means_of(means, joined))
        stays = (joined == torch.arange(x.shape[2], device=x.device)) | more
        return Merged(stays, rows, self.into(joined, more))

    def over_time(self, x: Tensor, but: Tensor) -> Tensor:
        """``x [I, F, P, D]`` with the mean over the run, ``but`` for tokens that stay, in each lead token: float32."""
        of = self.still & ~but
        total = over_runs(x.float().masked_fill(~of[..., None], 0.0), self.runs)
        count = over_runs(of.float(), self.runs).clamp(min=1)
        mean = total / count[..., None]
        at = self.runs[:, :, None, None].expand_as(mean)
        return torch.where(self.lead[..., None], mean.gather(1, at), x.float())

    def into(self, joined: Tensor, more: Tensor) -> Tensor:
        """``[I, F, P]`` int64 the place ``f P + p`` in its video of what each token went into, -1 = into nothing.

        That is the centre, the place ``joined [I, F, P]`` in its frame (-1 = none), of itself or, where it stands still and is
        not one of ``more`` that stay, of its run's lead token.
        """
        F, P = self.still.shape[1:]
        frames, places = torch.arange(F, device=joined.device)[:, None], torch.arange(P, device=joined.device)
        centre = torch.where(joined < 0, -1, joined + frames * P)
        mine = torch.where(self.still & ~more, self.first_frames()[..., None], frames) * P + places
        return centre.flatten(1).gather(1, mine.flatten(1)).view(joined.shape)


class Merged(NamedTuple):
    """What comes of the tokens of some videos.

    Attributes:
        kept: ``[I, F, P]`` bool.
        rows: ``[I, F, P, D]``, of those that stay.
        into: ``[I, F, P]`` int64, the place ``f P + p`` in its video of what each token was merged into, -1 = into nothing.
    """

    kept: Tensor
    rows: Tensor
    into: Tensor

    def targets(self, videos: Videos) -> Tensor:
        """``[I, F, P]`` int64, the place among its sample's tokens of what each one was merged into, -1 = it was not."""
        tokens = torch.arange(self.kept.shape[2], device=self.kept.device)
        places = videos.groups.places(tokens.expand(len(videos.numbers), -1)).view(len(self.kept), -1)
        target = places.gather(1, self.into.clamp(min=0).flatten(1)).view(self.into.shape)
        return target.masked_fill((self.into < 0) | self.kept, -1)


def remember_groups(ctx: TokenContext, policy: PruningPolicy, scenes: Mapping[Videos, Scene]) -> None:
    """Note for a later stage which group of the prompt each token is of: two a frame, lead and moving, and one of newlines.

    A token that stands still is of its run's lead.
    """
    frames = sum(len(videos.numbers) for videos in scenes)
    group = torch.full_like(ctx.ordinals, 2 * frames)
    for videos, scene in scenes.items():
        own = whole_numbers(videos.numbers, ctx.device).view(videos.shape)
        frame = torch.where(scene.still, own.gather(1, scene.first_frames())[..., None], own[..., None])
        videos.put(group, 2 * frame + scene.moving)
    ctx.shared[policy] = ctx.grids, group, 2 * frames + 1


def remembered_groups(ctx: TokenContext, policy: PruningPolicy) -> tuple[Tensor, int]:
    """Of each token that enters ``[B, N]`` the number of its group, and how many there are; one where none are noted."""
    known = ctx.shared.get(policy)
    if known is None or known[0] != ctx.grids:
        return torch.zeros_like(ctx.ordinals), 1
    return known[1].gather(1, ctx.ordinals.clamp(min=0)), known[2]


def settled(
    ctx: TokenContext,
    policy: PruningPolicy,
    frames: Frames,
    merge: Callable[[Videos], Merged],
    counted: bool = True,
) -> Reduction:
    """What ``merge`` makes of the videos of a batch, those of a shape together, as a policy answers it.

    ``counted`` says that as many stay as the policy says, which asks nothing of the device; else one host read.
    """
    rows = ctx.given("hidden").clone(memory_format=torch.contiguous_format)
    kept, merged = torch.zeros_like(ctx.mask), torch.full_like(ctx.ordinals, -1)
    for videos in frames.alike:
        made = merge(videos)
        for into, x in ((kept, made.kept), (rows, made.rows), (merged, made.targets(videos))):
            videos.put(into, x)
    if counted:
        quota = quota_of(ctx, policy, frames.groups)
        kept = kept | _newlines(ctx, frames, quota) if any(quota.rest) else kept
        counts = frames.groups.by_sample(quota.kept, quota.rest)
        index = select_counts(kept.float(), ctx, tuple(map(sum, counts)))
    else:
        index = index_of(kept)
    positions: Positions = policy.positions  # type: ignore[assignment]
    return Reduction(index, ops.gather_tokens([rows], index)[0], positions, merged=merged)


def _newlines(ctx: TokenContext, frames: Frames, quota: Quota) -> Tensor:
    """``[B, N]`` bool, the newline tokens that stay because all others of their image do."""
    groups, width = frames.groups, ctx.mask.shape[1]
    lines: list[set[int]] = [set() for _ in ctx.counts]
    for owner, places, n in zip(groups.owners, groups.rest, quota.rest, strict=True):
        lines[owner] |= set(places[:n])
    return whole_numbers(tuple(tuple(int(i in own) for i in range(width)) for own in lines), ctx.device) > 0
