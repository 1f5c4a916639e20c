"""FastVID: by segments of a video, the attended tokens of every frame, and density peaks into which the rest is merged."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vlmprune import ops
from vlmprune.policies.base import Needs, Positions, PruningPolicy, Reduction, TokenContext, outcome
from vlmprune.policies.by_image import budgets_of, ranked, vision_of
from vlmprune.policies.checks import check_keep, check_share, check_whole
from vlmprune.policies.choose import marks
from vlmprune.policies.parts.frames import frame_means, frames_of, run_numbers
from vlmprune.policies.parts.segment_peaks import Offer, divided, merged_into_peaks, taken
from vlmprune.policies.parts.segments import unlike_frames


@dataclass(frozen=True)
class FastVID(PruningPolicy):
    """Keeps the tokens most attended to in every frame, and merges the rest of a video's segment into density peaks of some
    frames.

    A segment ends where the frames' mean tokens differ: at the ``segments - 1`` least alike neighbours, and wherever their
    cosine is below ``threshold`` (DySeg in the paper). Every frame has an equal part of the budget, of which ``context`` is for
    peaks. Those of a segment go to its last frame and to every ``period``-th before that, in equal parts. A peak is a token
    that few denser ones are near to, among those of its frame that attention has not kept; for each of these frames all such
    tokens of the segment go to its most cosine-similar peak, whose hidden state becomes ``w`` times its own plus ``1 - w``
    times their mean (its own among them), ``w`` the larger of ``own`` and one over one more than their number (ATS and DTM).

    By quotas and merging this is the released code for LLaVA-OneVision. There attention and what frames are compared by come
    from SigLIP's pooling head, which the model does not have: here they are the mean attention over rows (or CLS) and the mean
    token, as in its code for Qwen2.5-VL (which also passes over frames above a cosine of 0.95; not here). In the released code
    a remainder of a segment's peaks is lost, and densities have noise added; here the count is exact, what is left goes to the
    peaks' frames by remainders, and of equal densities the earlier token's is higher. A frame that cannot take its peaks, where
    the released code fails, leaves them to the others. A newline token goes first. An image is one segment of one frame; one
    that is cut up has a frame for every tile and the small view.

    Args:
        keep: share of a video's tokens (float; the paper's 0.1) or tokens per video (int).
        segments: a video's segments at least, c in the paper, of as many frames.
        threshold: cosine of two frames below which a segment begins, the paper's tau, in [0, 1]; for Qwen2.5-VL released 0.84.
        context: share of the budget that goes to density peaks, d in the paper, in [0, 1].
        period: every how many frames of a segment one has its peaks, p in the paper.
        own: how much of itself a peak keeps at least, the released beta, in [0, 1].
        vision_layer: vision-tower layer whose attention is read.
        positions: ``"keep"`` their own (released code), or ``"pack"``: what stays stands at 0, 1, 2, ...
    """

    summary = "a video's segments: most attended tokens, and density peaks into which the rest is merged"
    paper = "FastVID: Dynamic Density Pruning for Fast Video Large Language Models (NeurIPS 2025), arXiv 2503.11187"
    formula = (
        "segments begin where cos of neighbouring frames' mean x_j < threshold or of the segments - 1 lowest\n"
        "of each frame keep the (1 - context) k / F highest mean_h V[vision_layer][h, CLS, j],  F = frames\n"
        "of its rest  d_ij = |x_i - x_j| / √D, D = columns;  p_j = exp(-mean of the 4 smallest d_ij²)\n"
        "s_j = p_j min_{p_i > p_j} d_ij;  keep the context · k highest, all in each segment's last frame, the\n"
        "period-th before it, …;  r = how many of the segment's rest are most cos-similar to j in its frame,\n"
        "m_j = their mean;  x_j ← w x_j + (1 - w) m_j,  w = max(own, 1 / (r + 1))"
    )
    checked = "reading"
    for_video = True
    growth = "n^2"  # densities take all pairs of a frame

    keep: int | float = 0.1
    segments: int = 8
    threshold: float = 0.9
    context: float = 0.4
    period: int = 4
    own: float = 0.6
    vision_layer: int = -2
    positions: Positions = "keep"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_whole("segments", self.segments, 1)
        check_share("threshold", self.threshold)
        check_share("context", self.context)
        check_whole("period", self.period, 1)
        check_share("own", self.own)

    layers = (0,)  # before the language model
    spend = "image"

    def needs(self, layer: int) -> Needs:
        return Needs(hidden=True, vision=(self.vision_layer,))

    def select(self, ctx: TokenContext) -> Tensor | Reduction:
        frames, hidden = frames_of(ctx), ctx.given("hidden")
        if not frames.groups.crops:
            return ctx.ordinals
        seen = vision_of(ctx, self.vision_layer, frames.groups).received()
        salient, context = divided(frames, budgets_of(ctx, self), self.context)
        parts, offers = frames.alike, list[Offer]()
        for videos in parts:
            x, real = videos.split(hidden), videos.real(ctx.device)
            runs = run_numbers(unlike_frames(frame_means(x, real), self.threshold, self.segments))
            own, peaks = (videos.counts(counts, ctx.device) for counts in (salient, context))
            most = max(context[g] for g in videos.numbers)
            offers.append(Offer.of(x, real, videos.take(seen), runs, own, peaks, self.period, most))
        index = ranked(ctx, self, taken(frames, parts, offers), self.positions).index(ctx)
        if not any(context):
            return outcome(index, self.positions)
        kept, made = marks(index, ctx.mask.shape[1]), hidden.contiguous().clone()
        for videos, offer in zip(parts, offers, strict=True):
            counts = tuple(sum(context[g] for g in own) for own in videos.members())
            rows = merged_into_peaks(videos.split(hidden), offer, videos.split(kept), counts, self.own)
            videos.put(made, rows)
        return outcome(index, self.positions, ops.gather_tokens([made], index)[0])
