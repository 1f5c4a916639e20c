"""What is compared: the unpruned model and each policy, on the plain path and with CUDA graphs, and two other ways to a policy's count."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from vlmprune.bench.prompts import Prompt, Smaller, smaller, why_not_smaller
from vlmprune.bench.published import published_style, why_not_published
from vlmprune.bench.shapes import FullSize
from vlmprune.checkpoints import Checkpoint
from vlmprune.models import Graphs, Run, meter, prune
from vlmprune.policies.base import PruningPolicy

UNPRUNED = "unpruned"
IDLE = "the policy did not prune this prompt"
Way = Literal["plain", "graphs", "smaller image", "published style"]
Kept = Sequence[tuple[int, int]]
"""Layer of each stage, and how many visual tokens of a sample stay from there on."""


@dataclass(frozen=True)
class Arm:
    """One way to answer the prompt.

    Attributes:
        method: the policy as typed, or "unpruned".
        way: how it runs.
        prompt: what is asked.
        policy: what prunes, or None.
        kept: what the policy kept when it was tried.
        image: the smaller image of that way.
        graphs: what holds the captured graphs of that way, over all rounds.
        reason: why it cannot run; None if it can.
    """

    method: str
    way: Way
    prompt: Prompt
    policy: PruningPolicy | None = None
    kept: Kept = ()
    image: Smaller | None = None
    graphs: Graphs | None = field(default=None, compare=False)
    reason: str | None = None

    @property
    def name(self) -> str:
        """A heading for tables and plots."""
        marks = {"plain": "", "graphs": " + graphs"}
        return self.method + marks.get(self.way, f" [{self.way}]")

    @contextmanager
    def scope(self, model: Any) -> Iterator[Run]:
        """Run the model in this way inside the block; yields what measures it."""
        with ExitStack() as stack:
            if self.image is not None:
                stack.enter_context(self.image.tower(model))
            if self.way == "published style":
                stack.enter_context(published_style(model, self.kept))
            ours = self.policy if self.way in ("plain", "graphs") else None
            scope = meter(model, self.graphs) if ours is None else prune(model, ours, self.graphs)
            yield stack.enter_context(scope)


def make_arms(
    checkpoint: Checkpoint,
    prompt: Prompt,
    policies: Mapping[str, PruningPolicy],
    kept: Mapping[str, Kept],
    baselines: bool,
) -> list[Arm]:
    """All arms, the unpruned one first; those that cannot run here say why.

    Args:
        checkpoint: the model.
        prompt: one sample.
        policies: by what they are called.
        kept: what each of them kept of the prompt.
        baselines: also the smaller image and the published style, with the tokens of each policy.
    """
    arms = [Arm(UNPRUNED, "plain", prompt), _graphs(checkpoint, Arm(UNPRUNED, "plain", prompt))]
    for name, policy in policies.items():
        plain = Arm(name, "plain", prompt, policy, kept[name])
        arms += [plain, _graphs(checkpoint, plain)]
        if baselines:
            arms += [_smaller(checkpoint, plain), _published(plain)]
    return arms


def _graphs(checkpoint: Checkpoint, arm: Arm) -> Arm:
    reason = Graphs.refusal(torch.device(checkpoint.device))
    graphs = None if reason is not None else Graphs()
    return Arm(arm.method, "graphs", arm.prompt, arm.policy, arm.kept, graphs=graphs, reason=reason)


def _smaller(checkpoint: Checkpoint, arm: Arm) -> Arm:
    """An image of as many visual tokens as the policy keeps behind its last stage."""
    reason = why_not_smaller(checkpoint.config, isinstance(checkpoint, FullSize))
    if reason is None and not arm.kept:
        reason = IDLE
    if reason is None and arm.kept[-1][1] < arm.prompt.images:
        reason = f"the policy keeps {arm.kept[-1][1]} visual tokens, fewer than images"
    if reason is not None:
        return Arm(arm.method, "smaller image", arm.prompt, arm.policy, reason=reason)
    image = smaller(checkpoint.config, arm.prompt, arm.kept[-1][1])
    return Arm(arm.method, "smaller image", image.prompt, arm.policy, image=image)


def _published(arm: Arm) -> Arm:
    reason = why_not_published([layer for layer, _ in arm.kept]) if arm.kept else IDLE
    if arm.policy is not None and arm.policy.restores:
        reason = "the published style brings no tokens back"
    return Arm(arm.method, "published style", arm.prompt, arm.policy, arm.kept, reason=reason)
