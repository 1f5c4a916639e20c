"""PruneVid: frames in segments, what stands still in one merged over time, all of it in space; later what the question asks for."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vlmprune.policies.base import Needs, Positions, Reduction, TokenContext
from vlmprune.policies.by_image import quota_of
from vlmprune.policies.checks import BEFORE, check_keep, check_layer, check_number, check_share
from vlmprune.policies.choose import FLOOR, quotas
from vlmprune.policies.counts import keep_count
from vlmprune.policies.groups import Groups
from vlmprune.policies.parts.frames import Frames, Videos
from vlmprune.policies.parts.peaks import NEAR, best_of_groups
from vlmprune.policies.parts.raters import most_asked
from vlmprune.policies.parts.scenes import Merged, Scene, remember_groups, remembered_groups, settled
from vlmprune.policies.parts.two_stages import MergesFirst


@dataclass(frozen=True)
class PruneVid(MergesFirst):
    """For videos. Stage 1 merges over time and in space, stage 2 keeps what the question's words attend to without RoPE.

    Stage 1: mean rows of the frames are clustered around density peaks, ``int(segments F)`` of F frames, at least 1; of every
    cluster its longest stretches of frames stay together, the others go to the longer neighbour. A place stands still in such a
    segment if its tokens are alike, mean cosine of all pairs above ``tau``, and becomes their mean, at the first frame. The
    merged tokens of a segment, and the moving ones of each frame, if more than 14, are clustered into ``int(ratio m)`` means of
    m. Stage 2: a token's score is the most that any head of any word behind the last image pays to it, softmax over all keys,
    without RoPE and causal mask (evenly spread without words); of each of those groups the best ``int(then m)`` stay, one of a
    sample at least. The authors also cut earlier caches: ``earlier_kv="compact"``.

    How many stay depends on the video, at one host read a stage; ``keep`` says it instead (not in the paper): groups keep in
    proportion to their size, exactly as many together, and where less is distinct the first tokens that stand still stay beside
    their mean. An image is a video of one frame, all of it moving; frames of other shape (small view, tiles) begin a segment.
    Asked without stage 1, all are one group. Not as released: of fewer than 7 frames it fails, here all are neighbours, and
    fewer than 4 are one segment; rows are not sorted by score; ties of density go to the lower place, not by noise; newlines go.

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
    spend = "image"

    def __post_init__(self) -> None:
        check_keep(self.ratio, "ratio", counts=False)
        check_keep(self.then, "then", counts=False)
        check_layer(self.layer, 1, BEFORE)
        check_number("tau", self.tau)
        check_share("segments", self.segments)
        if self.keep is not None:
            check_keep(self.keep)

    @property
    def fixed_count(self) -> bool:
        return self.keep is not None

    def needs(self, layer: int) -> Needs:
        return Needs(attention="previous", rows="text") if layer else Needs(hidden=True)

    def kept(self, tokens: int, images: float, layer: int) -> int:
        """Exact with ``keep``; without, what stays if nothing stands still and groups are large."""
        keep = self.ratio if self.keep is None else self.keep
        return super().kept(tokens, images, layer) if layer else keep_count(keep, tokens, images, "image")

    def first(self, ctx: TokenContext, crops: Groups) -> Reduction:
        frames, hidden, kept = Frames(crops), ctx.given("hidden"), quota_of(ctx, self, crops).kept
        scenes = {v: Scene.similar(v, v.split(hidden), self.segments, self.tau) for v in frames.alike}
        remember_groups(ctx, self, scenes)

        def merge(videos: Videos) -> Merged:
            scene, total = scenes[videos], videos.counts(kept, ctx.device).sum(1)
            shared = scene.parts(self.ratio, whole=2 * NEAR) if self.keep is None else scene.shared_out(total)
            return scene.clustered(videos.split(hidden), *shared)

        return settled(ctx, self, frames, merge, self.keep is not None)

    def second(self, ctx: TokenContext) -> Tensor:
        keep = self.then if self.keep is None else quotas(ctx, self)
        return best_of_groups(ctx, most_asked(ctx).nan_to_num(FLOOR), *remembered_groups(ctx, self), keep)
