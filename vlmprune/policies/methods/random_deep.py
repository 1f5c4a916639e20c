"""Random pruning beyond the information horizon: deep in the decoder no choice of visual tokens beats a random one."""

from __future__ import annotations

from dataclasses import dataclass

from vlmprune.policies.methods.random import Random


@dataclass(frozen=True)
class RandomDeep(Random):
    """Keeps a random subset at a deep layer, where visual tokens have given their information away and look alike.

    Meant as the second half of a pair. The paper's recipe is a good method early and this one deep::

        Stages([DivPrune(keep=0.5), RandomDeep(layer=20, keep=0.25)])

    or, as a text, ``divprune:keep=0.5 + random_deep:layer=20,keep=0.25``. Where the horizon lies depends on the model
    and the task: deeper for stronger models and for reading text in images. The paper prunes from about layer 20 on.

    Settings as for ``Random``.
    """

    summary = "a random subset at a deep layer, after a good early method"
    paper = "When Token Pruning is Worse than Random: Understanding Visual Token Information in VLLMs, arXiv 2512.07580"
    checked = "reading"
    presets = {}  # it acts after another method, whose budget it is

    layer: int = 20
