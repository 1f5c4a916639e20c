"""SGL: keep the visual tokens that a small model looked at while it answered the same question."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from vlmprune.errors import check
from vlmprune.policies.answer import check_scores
from vlmprune.policies.base import PruningPolicy, Ranking, TokenContext
from vlmprune.policies.by_image import ranked
from vlmprune.policies.checks import check_keep, check_layer, spelt


class Guide(Protocol):
    """Anything that scores the visual tokens of a prompt: ``vlmprune.guidance.Guidance`` is what a small model found."""

    def __call__(self, ctx: TokenContext) -> Tensor:
        """``[B, N]`` float, the higher survives, for the tokens that enter the stage (``ctx.ordinals`` says which of the
        prompt's they are); padding may hold anything. Captured as a CUDA graph, it must depend on the context alone."""
        ...


@dataclass(frozen=True)
class SGL(PruningPolicy):
    """Keeps the visual tokens with the highest scores of a guide: a small model's attention, summed over its whole run.

    ``vlmprune.guidance`` runs the small model, makes the guide of one prompt, and leaves the large model out where the
    small one is sure (``Stitch``). A guide made there belongs to one prompt, and the policy with it.

    As released, positions are kept and ``int(0.4 * layers)`` is the layer of the example script, with 40 % kept: the mean
    over the inputs of a 48-layer model is then 64 % of the tokens, with 0.2 for both 35 %, with 0.05 for both 9 %. One
    deviation: the released code keeps no token where the share rounds down to none, here one stays. The authors' own
    lines, run beside this on the attention matrices of tiny eager models (two decoders, five prompts, three shares), keep
    the same tokens in 30 cases of 30; their sums and ours differ by 2e-6 of the largest one, in float32.

    Args:
        guide: scores the tokens of the prompt under way.
        layer: layers 0..layer-1 see every token, ``layer`` and later only the kept ones; 0 = before the language model. 12 is
            that of 32 layers.
        keep: share (float) of the visual tokens, or visual tokens per image (int).
        spend: "prompt": the best tokens of all images of a prompt stay, as released; "image": every image keeps its own
            budget; "crop": which is shared out over its crops (tiles, small view, frames).

    Raises:
        InputError: a setting is out of range; in ``rank``, scores of another shape, or what the guide itself refuses.

    Example:
        >>> from vlmprune import SGL
        >>> SGL(lambda ctx: -ctx.ordinals.float(), keep=2).select(ctx)  # the first ones of each prompt
        tensor([[ 0,  1, -1, -1],
                [ 0,  1,  2,  3]])
    """

    summary = "tokens that a small model attended to, over all its layers and its answer"
    paper = (
        "A Stitch in Time Saves Nine: Small VLM is a Precise Guidance for Accelerating Large VLMs (CVPR 2025), "
        "arXiv 2412.03324; github.com/NUS-HPC-AI-Lab/SGL at 7e76fd2"
    )
    formula = (
        "s = guide(context); that of vlmprune.guidance: s_j = ∑_l ∑_h ∑_i A[l][h, i, j] in the small model,\n"
        "over its rows i from the last visual token on, and those of its answer but the last\n"
        "keep the k highest s_j"
    )
    growth = "n"

    guide: Guide
    layer: int = 12
    keep: int | float = 0.4
    spend: Literal["prompt", "image", "crop"] = "prompt"

    def __post_init__(self) -> None:
        check(
            callable(self.guide), "guide", "a function of a TokenContext that scores tokens", repr(self.guide)
        )
        check_layer(self.layer)
        check_keep(self.keep)

    def __repr__(self) -> str:
        """With a function by its name, as typed: an address is another in every run, and results go by this text."""
        return f"SGL({', '.join(f'{name}={text}' for name, text in spelt(self).items())})"

    def rank(self, ctx: TokenContext) -> Ranking:
        return ranked(ctx, self, check_scores(self.guide(ctx), ctx, "guide"))
