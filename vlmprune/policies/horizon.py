"""Random pruning beyond the information horizon: deep in the decoder no choice of visual tokens beats a random one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from vlmprune.policies.random import Random


@dataclass(frozen=True)
class RandomDeep(Random):
    """Keeps a random subset at a deep layer, where visual tokens have given their information away and look alike.

    Meant as the second half of a pair. The paper's recipe is a good method early and this one deep::

        Stages([DivPrune(keep=0.5), RandomDeep(layer=20, keep=0.25)])

    Where the horizon lies depends on the model and the task: deeper for stronger models and for reading text in
    images. The paper prunes from about layer 20 on.

    Args:
        layer: layers 0..layer-1 see every token that came this far, ``layer`` and later only the kept ones.
        keep: share (float) of the visual tokens entering the layer, or visual tokens per image (int).
        seed: which draw.
        spend: "prompt": the best tokens of all images of a prompt stay; "image": every image keeps its own budget.

    Raises:
        ValueError: a setting is out of range.
    """

    summary: ClassVar[str] = "a random subset at a deep layer, after a good early method"
    paper: ClassVar[str] = (
        "When Token Pruning is Worse than Random: Understanding Visual Token Information in VLLMs, arXiv 2512.07580"
    )
    checked: ClassVar[str] = "reading"
    presets: ClassVar[Mapping[int, str]] = {}  # it acts after another method, whose budget it is

    layer: int = 20
