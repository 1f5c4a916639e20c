"""PruneVid: frames in segments, what stands still in one merged over time, all of it in space; later what the question asks for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlmprune import ops
from vlmprune.constants import whole_numbers
from vlmprune.policies.base import Needs, Positions, PruningPolicy, Reduction, TokenContext
from vlmprune.policies.checks import BEFORE, check_keep, check_layer, check_number, check_share, share_of
from vlmprune.policies.choose import FLOOR, falling_places, index_of, quotas, rank_within, select_counts
from vlmprune.policies.counts import keep_count
from vlmprune.policies.inputs import Rating
from vlmprune.policies.parts.frames import Frames, frame_means, frames_of, over_runs, run_numbers
from vlmprune.policies.parts.peaks import density_peaks, in_proportion
from vlmprune.policies.parts.raters import rated
from vlmprune.policies.parts.scenes import Scene, settled, totals

NEAR = 7
"""Neighbours that make a density; a group of at most twice as many tokens is not clustered."""


@dataclass(frozen=True)
class PruneVid(PruningPolicy):
    """For videos. Stage 1 merges over time and in space, stage 2 keeps what the question's words attend to without RoPE.

    Stage 1: mean rows of the frames are clustered around density peaks, ``int(segments F)`` of F frames, at least 1; of every
    cluster its longest stretches of frames stay together, the others go to the longer neighbour. A place stands still in
    such a segment if its tokens are alike, mean cosine of all pairs above ``tau``, and becomes their mean, at the first frame. The
    merged tokens of a segment, and the moving ones of each frame, if more than 14, are clustered into ``int(ratio m)`` means
    of m. Stage 2: a token's score is the most that any head of any word behind the last image pays to it, softmax over all
    keys, without RoPE and causal mask; of each of those groups the best ``int(then m)`` stay, one of a sample at least. The
    authors also drop what the layers before have cached of the others: ``earlier_kv="compact"``.

    How many stay depends on the video, which costs one host read a stage; ``keep`` says it instead (not in the paper): then the
    groups keep in proportion to their size, exactly as many together, and the first tokens that stand still stay beside their
    mean if less is distinct.

    An image is a video of one frame, all of it moving. Frames of other shape (small view, tiles) begin a segment. A sample
    without text behind its image keeps tokens spread evenly in stage 2; asked without stage 1, its tokens are one group.

    Not as released: of fewer than 7 frames it fails, here all are neighbours, and fewer than 4 are one segment;
    rows stand in raster order (there clusters by falling score); ties of density go to the lower place (there noise
    decides); a newline token goes.

    Args:
        ratio: share of a group that stage 1 leaves.
        then: share of a group (with ``keep``, of all) that stage 2 leaves.
        layer: decoder layer of stage 2, which the attention of the one before chooses for; at least 1. The authors' layer 10.
        tau: mean cosine above which a place stands still.
        segments: how many clusters of frames, a share of the frames.
        keep: None, or instead of ``ratio`` tokens per image or video (int) or a share (float) for stage 1.
        positions: after stage 1: ``"keep"``, a merged token having its centre's, or ``"pack"`` (released code).
    """

    summary = "still and moving tokens clustered, then the question's attention without RoPE"
    paper = (
        "PruneVid: Visual Token Pruning for Efficient Video Large Language Models (Findings of ACL 2025), "
        "arXiv 2412.16117"
    )
    formula = (
        "stage 1: density peaks of the mean x of frames make segments\n"
        "still: mean cos(x_i, x_j) over the pairs of one place in its segment > tau; those become their mean\n"
        "m = merged tokens of one segment, or moving ones of one frame:\n"
        "more than 14 become ⌊ratio · m⌋ means of clusters around density peaks  (keep=None)\n"
        "stage 2: s_j = max_t max_h softmax_j z[K-1][h, t, j] over all keys, z without RoPE and causal mask\n"
        "of m tokens of every such group keep the ⌊then · m⌋ highest s_j"
    )
    for_video = True
    growth = "n^2"  # clusters

    ratio: float = 0.5
    then: float = 0.4
    layer: int = 11
    tau: float = 0.8
    segments: float = 0.25
    keep: int | float | None = None
    positions: Positions = "keep"

    def __post_init__(self) -> None:
        check_keep(self.ratio, "ratio", counts=False)
        check_keep(self.then, "then", counts=False)
        check_layer(self.layer, 1, BEFORE)
        check_number("tau", self.tau)
        check_share("segments", self.segments)
        if self.keep is not None:
            check_keep(self.keep)

    @property
    def layers(self) -> tuple[int, ...]:
        return (0, self.layer)

    @property
    def fixed_count(self) -> bool:
        return self.keep is not None

    def needs(self, layer: int) -> Needs:
        """Stage 1: the rows. Stage 2: query and key of the layer before it, the text's rows."""
        return Needs(attention="previous", rows="text") if layer else Needs(hidden=True)

    def at(self, share: float) -> Self:
        return replace(self, keep=share_of(share), then=share_of(share))

    def spends(self, layer: int) -> str:
        return "prompt" if layer else "image"

    def kept(self, tokens: int, images: float, layer: int) -> int:
        """Exact with ``keep``; without, what stays if nothing stands still and groups are large."""
        keep = self.then if layer else self.ratio if self.keep is None else self.keep
        return keep_count(keep, tokens, images, self.spends(layer))

    def select(self, ctx: TokenContext) -> Tensor | Reduction:
        return self._asked(ctx) if ctx.layer else self._merged(ctx)

    def _merged(self, ctx: TokenContext) -> Tensor | Reduction:
        frames = frames_of(ctx)
        if not frames.groups.crops:
            return ctx.ordinals
        x = frames.split(ctx.given("hidden"))
        scene = self._scene(ctx, frames, x)
        ctx.shared[self] = (ctx.grids, *_groups(scene, frames))
        if self.keep is None:
            shares = torch.where(
                scene.sizes > 2 * NEAR, (scene.sizes.double() * self.ratio).long(), scene.sizes
            )
            shares, more = shares.view(len(shares), -1, 2), torch.zeros_like(scene.real)
        else:
            shares, more = scene.shared_out(totals(ctx, self, frames))
        means = scene.over_time(x, more)
        flat, near = means.flatten(0, 1).contiguous(), torch.full_like(shares[..., 0].flatten(), NEAR)
        parts = zip((scene.lead, scene.moving), shares.flatten(0, 1).unbind(1), strict=True)
        lead, moving = (density_peaks(flat, of.flatten(0, 1), n, near, NEAR) for of, n in parts)
        joined = torch.maximum(lead, moving)
        rows = ops.merge_tokens(flat, joined, x.shape[2]).view(x.shape)
        joined = joined.view(scene.real.shape)
        stays = (joined == torch.arange(x.shape[2], device=ctx.device)) | more
        rows = torch.where(more[..., None], x.float(), rows)
        return settled(ctx, self, frames, stays, rows, scene.into(joined, more), self.keep is not None)

    def _scene(self, ctx: TokenContext, frames: Frames, x: Tensor) -> Scene:
        real, there = frames.real(ctx.device), frames.there(ctx.device)
        wanted = tuple(max(1, int(n * self.segments)) for n in frames.counts)
        near = torch.full_like(there[:, 0], NEAR, dtype=torch.int64)
        clusters = density_peaks(
            frame_means(x, real), there, whole_numbers(wanted, ctx.device), near, min(NEAR, frames.most)
        )
        starts = stretches(clusters, there) | ~frames.follows(ctx.device)
        runs = run_numbers(starts, there)
        length = over_runs(there.float(), runs)
        total = over_runs(normalize(x.float(), dim=-1), runs).square().sum(-1)
        alike = (total - length[..., None]) / (length * (length - 1)).clamp(min=1)[..., None]
        still = (alike > self.tau) & (length > 1)[..., None]
        return Scene(
            starts, runs, still.gather(1, runs.clamp(min=0)[..., None].expand_as(still)) & real, real
        )

    def _asked(self, ctx: TokenContext) -> Tensor | Reduction:
        seen = ctx.given("attention").chunk()
        rating = seen.rating(unrotated=True, head_reduce="max", row_reduce="max")
        rating = Rating(rating.scoring._replace(causal=False), rating.group)
        scores = rated(rating.scores(), ctx).nan_to_num(FLOOR)
        groups, many, known = torch.zeros_like(ctx.ordinals), 1, ctx.shared.get(self)
        if known is not None and known[0] == ctx.grids:
            groups, many = known[1].gather(1, ctx.ordinals.clamp(min=0)), known[2]
        sizes = scores.new_zeros(len(ctx.counts), many, dtype=torch.int64)
        sizes = sizes.scatter_add(1, groups, ctx.mask.long())
        each = quotas(ctx, self)
        if self.keep is None:
            counts = (sizes.double() * self.then).long()
        else:
            counts = in_proportion(sizes, whole_numbers(tuple(each), ctx.device))
        own = rank_within(scores.masked_fill(~ctx.mask, float("-inf")), groups)
        stays = (own < counts.gather(1, groups)) & ctx.mask
        if self.keep is not None:
            return select_counts(stays.float(), ctx, each)
        best = (falling_places(scores, ctx.mask) == 0) & ctx.mask
        return index_of(stays | (best & ~stays.any(1, keepdim=True)))


def _groups(scene: Scene, frames: Frames) -> tuple[Tensor, int]:
    """``[B, N]`` which group every token is of, and how many there are: two a frame, and one of what is of no frame."""
    videos, F, _ = scene.real.shape
    at, device = scene.first_frames()[..., None], scene.real.device
    frame = torch.where(scene.still, at, torch.arange(F, device=device)[:, None])
    number = 2 * (frame + F * torch.arange(videos, device=device)[:, None, None]) + scene.moving
    return frames.spread(number, fill=2 * videos * F), 2 * videos * F + 1


def stretches(clusters: Tensor, there: Tensor) -> Tensor:
    """Where segments begin, ``[I, F]`` bool, of frames ``there`` in ``clusters [I, F]``.

    Of every cluster the longest stretches of frames stay, unless they are single frames. Frames in between join the longer
    of the stretches beside them, the one before if they are as long, as it has grown by then.
    """
    frames = torch.arange(there.shape[1], device=there.device)
    runs = run_numbers(clusters != clusters.roll(1, 1), there)
    length = over_runs(there.float(), runs).long().gather(1, runs.clamp(min=0))
    same = clusters[:, :, None] == clusters[:, None, :]
    longest = torch.where(same & there[:, None], length[:, None], 0).amax(2)
    stays = there & (length == longest) & (longest > 1)
    later = (
        torch.where(stays, frames, len(frames)).flip(1).cummin(1).values.flip(1).clamp(max=len(frames) - 1)
    )
    after = torch.where(stays.gather(1, later), length.gather(1, later), 0)
    label, grown = torch.zeros_like(clusters[:, 0]), torch.zeros_like(clusters[:, 0])
    joins, begins = label, list[Tensor]()
    for t in range(len(frames)):
        opens = ~stays[:, t] & (stays[:, t - 1] if t else True)
        nearest = torch.where(grown >= after[:, t], label, clusters.gather(1, later[:, t, None])[:, 0])
        joins = torch.where(opens, nearest, joins)
        new = torch.where(stays[:, t], clusters[:, t], joins)
        begins.append(new != label)
        label, grown = new, torch.where(new == label, grown + 1, 1)
    return torch.stack(begins, 1)
