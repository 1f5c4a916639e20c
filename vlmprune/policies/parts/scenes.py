"""Runs of a video's frames in which some places stand still: what is merged over time, what moves, and what comes of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmprune import ops
from vlmprune.constants import whole_numbers
from vlmprune.policies.base import Positions, PruningPolicy, Reduction, TokenContext
from vlmprune.policies.by_image import quota_of
from vlmprune.policies.choose import index_of, select_counts
from vlmprune.policies.groups import Quota
from vlmprune.policies.parts.frames import Frames, over_runs
from vlmprune.policies.parts.peaks import in_proportion


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

    def over_time(self, x: Tensor, but: Tensor) -> Tensor:
        """``x [I, F, P, D]`` with the mean over the run, ``but`` for tokens that stay, in each lead token: float32."""
        of = self.still & ~but
        total = over_runs(x.float().masked_fill(~of[..., None], 0.0), self.runs)
        count = over_runs(of.float(), self.runs).clamp(min=1)
        mean = total / count[..., None]
        at = self.runs.clamp(min=0)[:, :, None, None].expand_as(mean)
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


def totals(ctx: TokenContext, policy: PruningPolicy, frames: Frames) -> Tensor:
    """``[I]`` int64 how many tokens of its frames each image keeps."""
    kept = quota_of(ctx, policy, frames.groups).kept
    return whole_numbers(tuple(sum(kept[g] for g in own) for own in frames.groups.members), ctx.device)


def settled(
    ctx: TokenContext,
    policy: PruningPolicy,
    frames: Frames,
    kept: Tensor,
    rows: Tensor,
    into: Tensor,
    counted: bool = True,
) -> Reduction:
    """A choice of tokens of frames, with new rows, as a policy answers it.

    Args:
        kept: ``[I, F, P]`` bool.
        rows: ``[I, F, P, D]``, of those that stay.
        into: ``[I, F, P]`` int64, the place ``f P + p`` in its video of what each token was merged into, -1 = into nothing.
        counted: whether as many stay as the policy says, which asks nothing of the device; else one host read.
    """
    hidden, groups = ctx.given("hidden"), frames.groups
    marks = frames.spread(kept.float())
    if counted:
        quota = quota_of(ctx, policy, groups)
        marks = marks + _newlines(ctx, frames, quota) if any(quota.rest) else marks
        each = tuple(map(sum, groups.by_sample(quota.kept, quota.rest)))
        index = select_counts(marks, ctx, each)
    else:
        index = index_of(marks > 0)
    made = torch.where(frames.spread(kept)[..., None], frames.spread(rows).to(hidden.dtype), hidden)
    tokens = torch.arange(rows.shape[2], device=ctx.device).expand(len(groups.crops), -1)
    place = frames.lay(groups.places(tokens)).flatten(1)
    gone = (into < 0) | kept
    merged = place.gather(1, into.clamp(min=0).flatten(1)).view(into.shape).masked_fill(gone, -1)
    positions: Positions = policy.positions  # type: ignore[assignment]
    return Reduction(
        index, ops.gather_tokens([made], index)[0], positions, merged=frames.spread(merged, fill=-1)
    )


def _newlines(ctx: TokenContext, frames: Frames, quota: Quota) -> Tensor:
    """``[B, N]`` float32, 1 at the newline tokens that stay because all others of their image do."""
    groups, width = frames.groups, ctx.mask.shape[1]
    lines: list[set[int]] = [set() for _ in ctx.counts]
    for owner, places, n in zip(groups.owners, groups.rest, quota.rest, strict=True):
        lines[owner] |= set(places[:n])
    return whole_numbers(
        tuple(tuple(int(i in own) for i in range(width)) for own in lines), ctx.device
    ).float()
