"""What a scorer learns on glyphworld: which visual tokens show what a question asks for, and losses that say how far it is off."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

# the folder only: a checkout must stay off the path
sys.path.insert(0, str(Path(__file__).parents[1] / "glyphworld"))

from training.wording import full_prompt
from world.questions import Question, ask_all
from world.scenes import Box, Scene, make_scene
from world.words import COLOR_NAMES, SHAPES

from vlmprune.policies import Scorer, TokenContext
from vlmprune.training import context_of

PATCH = 8
FIRST_SEED = 3_000_000  # scenes below 1,000,000 are for evaluation
_STREAM = 17  # of a scene's random numbers: another than that of the questions which evaluations ask
_FEWEST_PIXELS = 8  # of a box in a patch that is said to show it
_WARM_UP = 20  # steps
_CONSTANT = 0.5  # share of the steps before the learning rate falls to zero
_SMOOTH = 1.0  # of the dice loss: what keeps it finite


@dataclass(frozen=True)
class Lesson:
    """A batch of prompts at the stage, and the truth about them.

    Attributes:
        ctx: what the scorer is shown.
        shown: ``[B, N]`` bool, whether a token shows what is asked for; every sample has one that does.
    """

    ctx: TokenContext
    shown: Tensor


def shown(scene: Scene, question: Question) -> NDArray[np.bool_] | None:
    """Which patches, in raster order, show what is asked for; None where that is nowhere: none to count, none to be found."""
    boxes = [question.box] if question.box is not None else _counted(scene, question)
    side = scene.side // PATCH
    pixels = np.zeros((scene.side, scene.side), bool)
    patches = np.zeros((side, side), bool)
    for box in boxes:
        pixels[:] = False
        pixels[box.top : box.bottom, box.left : box.right] = True
        patches |= pixels.reshape(side, PATCH, side, PATCH).sum((1, 3)) >= _FEWEST_PIXELS
    return patches.ravel() if patches.any() else None


def _counted(scene: Scene, question: Question) -> list[Box]:
    """Of the things that a question counts."""
    if question.family != "count":
        return []
    word = question.words[2]
    return [
        thing.box
        for thing in scene.things
        if word == "objects" or word in (COLOR_NAMES[thing.color], SHAPES[thing.shape])
    ]


def lessons(
    model: nn.Module, processor: Any, scorer: Scorer, seeds: Sequence[int], scenes: int
) -> Iterator[Lesson]:
    """One lesson for every ``scenes`` of these seeds: each scene's picture with every question that has an answer in it."""
    side, layer = model.config.vision_config.image_size, scorer.layer or 0
    for start in range(0, len(seeds), scenes):
        images, texts, truth = [], [], []
        for seed in seeds[start : start + scenes]:
            scene = make_scene(seed, side)
            for question in ask_all(scene, np.random.default_rng((seed, _STREAM))):
                patches = shown(scene, question)
                if patches is not None:
                    images.append(Image.fromarray(scene.image))
                    texts.append(full_prompt(processor, " ".join(question.words)))
                    truth.append(patches)
        inputs = processor(
            text=texts, images=images, padding=True, return_tensors="pt", add_special_tokens=False
        )
        ctx = context_of(model, inputs.to(model.device, model.dtype), scorer.needs, layer)
        yield Lesson(ctx, torch.from_numpy(np.stack(truth)).to(model.device))


def loss_of(scorer: Scorer, lesson: Lesson) -> Tensor:
    """Dice and cross-entropy of every sample, averaged. GlimpsePrune weighs them 1 and 0.1 (its configurations)."""
    scores, truth = scorer(lesson.ctx).float(), lesson.shown.float()
    there, found = lesson.ctx.mask.float(), scores.sigmoid()
    both, all_ = (found * truth * there).sum(1), ((found + truth) * there).sum(1)
    dice = 1 - (2 * both + _SMOOTH) / (all_ + _SMOOTH)
    each = binary_cross_entropy_with_logits(scores, truth, reduction="none") * there
    return (dice + 0.1 * each.sum(1) / there.sum(1)).mean()


def teach(scorer: Scorer, taught: Iterable[Lesson], steps: int, rate: float) -> Iterator[float]:
    """One update for each of so many lessons, by AdamW; yields the loss before it. Leaves the scorer in training mode."""
    optimizer = torch.optim.AdamW(scorer.parameters(), lr=rate, weight_decay=0.01)
    scorer.train()
    for step, lesson in enumerate(taught):
        loss = loss_of(scorer, lesson)
        loss.backward()
        nn.utils.clip_grad_norm_(scorer.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / _WARM_UP, (1 - step / steps) / (1 - _CONSTANT))
        optimizer.step()
        optimizer.zero_grad()
        yield float(loss.detach())


@torch.no_grad()
def found(scorer: Scorer, lessons: Iterable[Lesson], share: float) -> float:
    """Of the tokens that show what is asked for, which part is among the best ``share`` of all: the mean over all samples."""
    parts, training = [], scorer.training
    scorer.eval()
    for lesson in lessons:
        scores = scorer(lesson.ctx).float().masked_fill(~lesson.ctx.mask, float("-inf"))
        best = scores.topk(max(1, int(share * scores.shape[1])), dim=1).indices
        parts.append(lesson.shown.gather(1, best).sum(1) / lesson.shown.sum(1).clamp(max=best.shape[1]))
    scorer.train(training)
    return float(torch.cat(parts).mean())
