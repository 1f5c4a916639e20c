"""The frozen model as a referee: what it makes of an answer with all visual tokens, and with few of them and some words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmprune.checkpoints import Checkpoint
from vlmprune.compensation import Caption, Compensator, Discarded, Known
from vlmprune.errors import check
from vlmprune.models import prune
from vlmprune.policies.base import PruningPolicy
from vlmprune.training.objective import answer_kl
from vlmprune.training.prompts import Prompts, make_prompts
from vlmprune.training.samples import Sample

Captioned = Callable[[Compensator], PruningPolicy]
"""Makes the policy that prunes and lets this compensator speak."""


@dataclass(frozen=True, eq=False)
class Case:
    """A batch, as far as it does not depend on captions.

    Attributes:
        prompts: with their answers.
        reference: ``[B, n, V]`` float32 log-probabilities at the answers' positions, given all visual tokens.
        images: what is dropped of each sample's image, features in float32.
        silent: ``[B]`` float32, how far the pruned prompts without captions are from the reference (nats).
    """

    prompts: Prompts
    reference: Tensor
    images: Sequence[Discarded]
    silent: Tensor


class Referee:
    """A checkpoint in evaluation mode, of which nothing is trained."""

    def __init__(
        self, checkpoint: Checkpoint, captioned: Captioned, longest: int = 64, rows: int | None = None
    ) -> None:
        """Note what to use.

        Args:
            checkpoint: the model.
            captioned: how it is pruned and told.
            longest: tokens of an answer that count.
            rows: prompts at most in one call, for memory's sake; None = all candidates of a batch together.
        """
        self.checkpoint, self._captioned, self._longest, self._rows = checkpoint, captioned, longest, rows

    def hear(self, samples: Sequence[Sample]) -> Case:
        """Prepare a batch: a run with all tokens, and a pruned one without words, which shows what is dropped.

        Raises:
            InputError: as ``make_prompts``, or a prompt of more than one image.
        """
        prompts = make_prompts(self.checkpoint, samples, self._longest)
        with torch.inference_mode():
            reference = self._logits(prompts).float().log_softmax(-1)
        logits, images = self._prune(prompts)
        return Case(prompts, reference, images, answer_kl(reference, logits, prompts.counts).clone())

    def show(self, samples: Sequence[Sample]) -> list[Discarded]:
        """What is dropped of each sample's image, features in float32. Raises InputError as ``hear``."""
        return self._prune(make_prompts(self.checkpoint, samples, 0))[1]

    def _prune(self, prompts: Prompts) -> tuple[Tensor, list[Discarded]]:
        """Logits without words, and what is dropped."""
        shown = _Listener([""] * len(prompts.counts))
        with torch.inference_mode(), prune(self.checkpoint.model, self._captioned(shown)):
            logits = self._logits(prompts)
        check(bool(shown.images), "keep", "fewer visual tokens than an image has", "nothing to drop")
        # Copied outside of inference mode: what gradients flow through must not have been made in it.
        return logits, [
            Discarded(i.features.float().clone(), i.dropped.clone(), i.question) for i in shown.images
        ]

    @torch.no_grad()
    def divergences(self, case: Case, texts: Sequence[Sequence[str]]) -> Tensor:
        """How far each prompt with each of its texts is from the full one: ``[B, k]`` float32 (nats)."""
        batch, candidates = len(texts), len(texts[0])
        together = candidates if self._rows is None else max(1, self._rows // batch)
        columns = []
        for first in range(0, candidates, together):
            some = range(first, min(first + together, candidates))
            said = [texts[sample][number] for number in some for sample in range(batch)]
            with torch.inference_mode():
                with prune(self.checkpoint.model, self._captioned(_Speaker(said, case.images))):
                    logits = self._logits(case.prompts, len(some))
                for part in logits.view(len(some), batch, *logits.shape[1:]):
                    columns.append(answer_kl(case.reference, part, case.prompts.counts))
        return torch.stack(columns, 1).clone()

    def _logits(self, prompts: Prompts, times: int = 1) -> Tensor:
        """``[times * B, n, V]``; the whole batch so many times, one after the other."""
        inputs = {name: _again(part, times) for name, part in prompts.inputs.items()}
        out = self.checkpoint.model(**inputs, use_cache=False, logits_to_keep=prompts.rows)
        return out.logits


def _again(part: Any, times: int) -> Any:
    return torch.cat([part] * times) if times > 1 and isinstance(part, Tensor) else part


# Known texts are what ACCM asks for at every call, of all images in their order, without remembering any.
class _Listener(Known):
    """A compensator that says nothing and keeps what it is shown."""

    images: Sequence[Discarded] = ()

    def __call__(self, images: Sequence[Discarded], candidates: int = 1) -> list[Caption]:
        object.__setattr__(self, "images", list(images))
        return super().__call__(images, candidates)


@dataclass(frozen=True, eq=False)
class _Speaker(Known):
    """A compensator whose texts are known, and who sees to it that they are about what is dropped."""

    shown: Sequence[Discarded] = ()

    def __call__(self, images: Sequence[Discarded], candidates: int = 1) -> list[Caption]:
        then = [image.dropped for image in self.shown] * (len(images) // len(self.shown))
        now = [image.dropped for image in images]
        same = list(map(len, now)) == list(map(len, then)) and torch.equal(torch.cat(now), torch.cat(then))
        expected = f"one that chooses alike at every place of a batch, or rows={len(self.shown)}"
        check(same, "selection", expected, "another choice for a repeated prompt")
        return super().__call__(images, candidates)
