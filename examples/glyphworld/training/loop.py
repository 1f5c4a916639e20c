"""The training loop: two optimizers, a schedule driven by the share of the budget that is used, and a state that resumes.

Batches, and so everything but the clock, depend on the step alone: with a budget in steps a run that was stopped and
resumed ends with the same weights as one that was not.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import LlavaForConditionalGeneration, LlavaProcessor
from world.clutter import FIRST_SEED

from training.batches import Batch, Text, make_batch, make_text
from training.losses import DenseHeads, answer_loss, see
from training.optimizers import Single, make_optimizers
from training.wording import Wording

_WARM_UP = 30  # steps
_CONSTANT = 0.5  # share of the budget before the learning rate falls to zero
_DENSE_WEIGHT = 0.3  # of the dense losses beside the answers


@dataclass(frozen=True)
class Plan:
    """What is fixed when a run starts. The budget is ``steps`` if given, else ``minutes``."""

    side: int = 112
    minutes: float = 60.0
    steps: int | None = None
    batch: int = 12
    text: int = 128  # text positions a picture
    rate: float = 0.012
    looking: float = 0.08  # share of the budget at the start in which only the dense losses are trained
    first_seed: int = FIRST_SEED
    decoder_rate: float | None = None  # of a pretrained decoder against ``rate``; None: trained like the rest
    notes: int = (
        0  # rows of notes without a picture, for each picture; if any, tower and projector are frozen
    )
    clutter: float = 0.0  # of the scenes, 0 to 1


class Trainer:
    """A model in training: weights in float32, and computed in bfloat16 where ``mixed``, else in float32 throughout.

    Attributes:
        kind: what stands in front of the questions.
        make_heads: the class of the heads that exist during training only.
        weights: of the losses beside that of the answers.
        frozen: how the names of weights begin that stay as they are.
    """

    kind = "image"
    make_heads = DenseHeads
    weights: ClassVar[dict[str, float]] = {"dense": _DENSE_WEIGHT}
    frozen: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        model: LlavaForConditionalGeneration,
        processor: LlavaProcessor,
        plan: Plan,
        device: torch.device,
        mixed: bool = True,
    ) -> None:
        config = model.config
        self.model, self.plan, self.device, self.mixed = model.to(device), plan, device, mixed
        self.processor, self.wording = processor, Wording(processor, self.kind)
        sizes = config.vision_config.hidden_size, config.text_config.hidden_size
        self.heads = self.make_heads(*sizes).to(device)
        self.parts = nn.ModuleDict({"model": self.model, "heads": self.heads})
        frozen = plan.decoder_rate, plan.notes > 0, self.frozen
        self.optimizers, self.shares = make_optimizers(self.parts, *frozen)
        self.single = nullcontext() if mixed else Single()
        self.step, self.elapsed = 0, 0.0
        self.see: Callable[..., Any] = see
        self.answer_loss: Callable[..., Tensor] = answer_loss

    def compile(self) -> None:
        """Compile the two halves of the model: minutes at the first step, then faster steps."""
        self.see, self.answer_loss = torch.compile(see), torch.compile(answer_loss)

    @property
    def progress(self) -> float:
        """The share of the budget that is used."""
        if self.plan.steps is not None:
            return self.step / self.plan.steps
        return self.elapsed / (60 * self.plan.minutes)

    def train_step(self, batch: Batch | None = None, told: Text | None = None) -> dict[str, float]:
        """One update, by pictures, by text alone, or both. Returns the losses before it."""
        looking = self.progress < self.plan.looking
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.mixed):
            losses = self.losses(batch, told, looking)
            weights = self.weights | ({"dense": 1.0} if looking else {})
            total = sum(weights.get(name, 1.0) * loss for name, loss in losses.items())
        total.backward()
        nn.utils.clip_grad_norm_(self.parts.parameters(), 1.0)
        rate = self.plan.rate * min(1.0, (self.step + 1) / _WARM_UP)
        rate *= min(1.0, max(0.0, (1 - self.progress) / (1 - _CONSTANT)))
        for optimizer, shares in zip(self.optimizers, self.shares, strict=True):
            for group, share in zip(optimizer.param_groups, shares, strict=True):
                group["lr"] = rate * share
            with self.single:
                optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        return {name: float(loss.detach()) for name, loss in losses.items()}

    def losses(self, batch: Batch | None, told: Text | None, looking: bool) -> dict[str, Tensor]:
        """What is wrong now: with what is seen, unless one learns to read, and, unless one learns to look, with answers."""
        losses = {}
        if batch is not None:
            patches, projected = self.see(self.model, batch.images)
            if not self.plan.notes:
                losses["dense"] = self.heads(patches, projected, batch)
            if not looking:
                losses["answers"] = self.answer_loss(self.model, projected, batch)
        if told is not None:
            width = self.model.config.text_config.hidden_size
            nothing = torch.zeros(len(told.ids), 0, width, device=self.device)
            losses["told"] = self.answer_loss(self.model, nothing, told)
        return losses

    def batches(self) -> Dataset[tuple[Batch | None, Text | None]]:
        """The batch of every step."""
        return _Batches(self.plan, self.wording)

    def run(self, workers: int = 0, until: int | None = None) -> Iterator[dict[str, float]]:
        """Train until the budget is used (or to step ``until``); yields the losses of every step.

        The first step, in which a compiled model is compiled, does not count against ``minutes``.
        """
        last = until if until is not None else self.plan.steps if self.plan.steps is not None else 10**9
        batches = DataLoader(
            self.batches(),
            batch_size=None,
            sampler=range(self.step, last),
            num_workers=workers,
        )
        clock: float | None = None
        before = self.elapsed
        for batch in batches:
            if self.progress >= 1:
                return
            losses = self.train_step(*(None if part is None else part.to(self.device) for part in batch))
            clock = clock or time.monotonic()
            self.elapsed = before + time.monotonic() - clock
            yield losses

    def save(self, path: Path) -> None:
        """Write the whole state; a reader never sees half a file."""
        state = {
            "parts": self.parts.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "elapsed": self.elapsed,
        }
        torch.save(state, path.with_suffix(".part"))
        os.replace(path.with_suffix(".part"), path)

    def load(self, path: Path) -> None:
        """Continue from a state that ``save`` wrote."""
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.parts.load_state_dict(state["parts"])
        for optimizer, values in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(values)
        self.step, self.elapsed = state["step"], state["elapsed"]


class _Batches(Dataset[tuple[Batch | None, Text | None]]):
    """Batch number i of a plan, made where it is asked for (in a worker process if there are any)."""

    def __init__(self, plan: Plan, wording: Wording) -> None:
        self.plan, self.wording = plan, wording

    def __getitem__(self, step: int) -> tuple[Batch | None, Text | None]:
        plan = self.plan
        if not plan.batch:
            told = range(plan.first_seed + step * plan.notes, plan.first_seed + (step + 1) * plan.notes)
            return None, make_text(told, plan.side, self.wording, plan.text)
        seeds = range(plan.first_seed + step * plan.batch, plan.first_seed + (step + 1) * plan.batch)
        batch = make_batch(seeds, plan.side, self.wording, plan.text, plan.notes > 0, plan.clutter)
        if not plan.notes:
            return batch, None
        told = range(seeds.start * plan.notes, seeds.stop * plan.notes)
        return batch, make_text(told, plan.side, self.wording, plan.text)
