"""The table of families and kinds of methods on which every situation is tried, and runs of its cells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import vlmprune
from helpers.families import CASES, IMAGE, STEPS, VIDEO
from vlmprune.policies.base import Needs, PruningPolicy, Ranking, Reduction, TokenContext
from vlmprune.testing.recorded import Answer, Recorded, as_reduction

FAMILIES = (
    "llava-llama",
    "llava_next",
    "llava_onevision",
    "llava_onevision-video",
    "internvl",
    "idefics3",
    "smolvlm",
    "qwen2vl",
    "qwen2_5_vl-video",
    "qwen3vl-video",
)
KINDS: dict[str, PruningPolicy] = {
    "before": vlmprune.DivPrune(keep=0.4, positions="keep"),
    "before-tower": vlmprune.VisionZip(dominant=0.3, contextual=0.2, positions="keep"),
    "inside": vlmprune.PyramidDrop(layers=(3, 4), positions="keep"),
    "both": vlmprune.Stages(
        [vlmprune.FasterVLM(keep=0.6, positions="keep"), vlmprune.FastV(layer=3, keep=0.5)]
    ),
}
"""Before the decoder and inside it, with the vision tower's attention and without."""
CELLS = [(family, kind) for family in FAMILIES for kind in KINDS]
SCATTERED = vlmprune.LVLMCSP(cluster=0.4, then=0.3, scatter=2, prune=4)
"""A stage that brings back what the first one has set aside; on some families."""


@dataclass(frozen=True)
class Back(PruningPolicy):
    """Every token is back at a layer; a share of all, drawn, stays."""

    layer: int = 2
    keep: float = 1.0

    @property
    def layers(self) -> tuple[int, ...]:
        return (self.layer,)

    def needs(self, layer: int) -> Needs:
        return Needs(restored=True)

    def rank(self, ctx: TokenContext) -> Ranking:
        return vlmprune.Random(self.layer, self.keep).rank(ctx)


TOLERANCE = 2e-4  # absolute, on float32 logits of order 10

assert {*FAMILIES} <= {*CASES}


@torch.no_grad()
def answer(model: Any, inputs: dict[str, Tensor], policy: PruningPolicy, **settings: Any) -> tuple[Any, dict]:
    """What ``generate`` gives with a policy, and what the policy chose at each layer."""
    recorded = Recorded(policy)
    settings = {"do_sample": False, "output_logits": True, "max_new_tokens": STEPS} | settings
    with vlmprune.prune(model, recorded):
        out = model.generate(
            **inputs, **settings, return_dict_in_generate=True, suppress_tokens=[IMAGE, VIDEO]
        )
    return out, recorded.answers


def logits_of(out: Any) -> Tensor:
    """``[B, T, V]``."""
    return torch.stack(out.logits, 1)


def rows_of(said: dict[int, Answer], rows: slice) -> dict[int, Answer]:
    """The choices for some rows of a batch."""
    found = {}
    for layer, (at, change) in said.items():
        change = as_reduction(change)
        hidden = None if change.hidden is None else change.hidden[rows]
        found[layer] = at[rows], Reduction(change.index[rows], hidden)
    return found


def joined(one: dict[int, Answer], two: dict[int, Answer], past: int) -> dict[int, Answer]:
    """The choices of two turns as those of one prompt, whose position ``past`` is the second turn's first."""
    found = {}
    for layer in one:
        ats, indices, rows = [], [], []
        for (at, first), (later, second) in zip(_each(one[layer]), _each(two[layer]), strict=True):
            ats.append(torch.cat([at, later + past]))
            indices.append(torch.cat([first[0], second[0] + len(at)]))
            rows += [] if first[1] is None else [torch.cat([first[1], second[1]])]
        index = pad_sequence(indices, True, -1)
        found[layer] = (
            pad_sequence(ats, True, -1),
            Reduction(index, pad_sequence(rows, True) if rows else None),
        )
    return found


def _each(said: Answer) -> Any:
    """By sample: the tokens that entered, and which of them stayed as which rows."""
    entered, change = said[0], as_reduction(said[1])
    for b, (at, index) in enumerate(zip(entered, change.index, strict=True)):
        at, index = at[at >= 0], index[index >= 0]
        yield at, (index, None if change.hidden is None else change.hidden[b, : len(index)])
