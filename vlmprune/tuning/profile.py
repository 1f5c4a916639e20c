"""At which layer the model looks where the question says: attention of several questions about several images, compared."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor

from vlmprune.checkpoints import Checkpoint, check_padding, generate
from vlmprune.errors import check
from vlmprune.eval.ask import Subject, show, with_template
from vlmprune.eval.intervals import Estimate, bootstrap
from vlmprune.eval.questions import Question, read_questions
from vlmprune.policies.base import TokenContext
from vlmprune.policies.compose import Stages
from vlmprune.policies.custom import Custom
from vlmprune.progress import Progress, silent

ENOUGH, HARDLY = 0.8, 0.1
"""A layer is recommended from this share of the largest ``seeks`` on, and none where that is not even ``HARDLY``."""
TINY = 1e-7


@dataclass(frozen=True)
class Layer:
    """What a stage at ``layer`` would see of the layer before it. Both shares are of the best quarter of the visual tokens.

    Attributes:
        layer: the stage's; it reads the attention of decoder layer ``layer - 1``.
        moves: share in which two questions about one image differ: 0.75 is what chance gives. Other words alone are enough
            for that, whatever the image shows.
        seeks: share that neither the image nor the question alone foretells: what the model looks at because this question
            is asked about this image.
    """

    layer: int
    moves: Estimate
    seeks: Estimate


@dataclass(frozen=True)
class Profile:
    """How attention depends on the question, layer by layer.

    Attributes:
        layers: of stages 1, 2, ...
        recommended: the first stage with ``ENOUGH`` of the largest ``seeks``; None = there is hardly any.
        images: how many were shown, and how many questions were asked about each.
    """

    layers: tuple[Layer, ...]
    recommended: int | None
    images: int

    def as_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        rows = [
            {"layer": row.layer, "moves": row.moves._asdict(), "seeks": row.seeks._asdict()}
            for row in self.layers
        ]
        return asdict(self) | {"layers": rows}


def profile_layers(
    checkpoint: Checkpoint,
    questions: Path | str,
    *,
    families: Sequence[str] = (),
    images: int = 8,
    seed: int = 0,
    progress: Progress = silent,
) -> Profile:
    """Where attention begins to depend on the question: no answer is needed, and none is generated.

    As many images of one size are drawn, a question of each, and every question is asked about every image. Of each layer
    the last prompt row's attention a(image, question) is read, the mean of its heads, over the visual tokens alone. Questions
    differ from the first layers on, by their words alone: which quarter of an image's tokens is best then follows from what
    the image draws when other things are asked, and the question when other images are shown: the product of both means over
    that of the others (so that nothing foretells itself). ``seeks`` is what of the best quarter does not follow; 0.75 is as
    good as chance. Intervals are over images.

    The rule: ``recommended`` is the first stage with ``ENOUGH`` of the largest ``seeks``. The share was set by looking
    at two checkpoints of ``examples/glyphworld``, and is no law: another ``seed`` may name another layer. That attention
    depends on the question is not yet that it is right. Which layer answers best, ``search`` says.

    Args:
        checkpoint: whom to ask.
        questions: folder with a ``questions.jsonl`` and its images; answers and families may be left out.
        families: only these families of questions; empty: all.
        images: how many at most.
        seed: of the draws.
        progress: told what is done, how many images are through, and of how many.

    Raises:
        InputError: fewer than two images, in the setting or of one size among the questions; bad questions.
        ModelError: a model that cannot be pruned.
    """
    check(images >= 2, "images", "at least 2", images)
    asked = with_template(checkpoint, read_questions(Path(questions), families, labelled=False))
    depth = checkpoint.config.text_config.num_hidden_layers
    check(depth > 1, "model", "a decoder of several layers", depth)
    drawn = _drawn(asked, images, seed)
    check_padding(checkpoint.processor, len(drawn))
    subject, seen = Subject(checkpoint, len(drawn), 1), []
    progress(f"loading {checkpoint.source}", 0, 0)
    for done, shown in enumerate(drawn):
        progress("images", done, len(drawn))
        group = [replace(question, image=shown.image) for question in drawn]
        seen.append(_attention(subject, group, depth))
    rows = []
    for layer in range(1, depth):
        moves, seeks = _shares(torch.stack([image[layer - 1] for image in seen]))
        rows.append(Layer(layer, bootstrap(moves), bootstrap(seeks)))
    return Profile(tuple(rows), recommend(rows), len(drawn))


def recommend(rows: Sequence[Layer]) -> int | None:
    """The layer that the rule of ``profile_layers`` names.

    >>> rows = [Layer(i + 1, Estimate(x, x, x), Estimate(x, x, x)) for i, x in enumerate((0.1, 0.25, 0.4, 0.42))]
    >>> recommend(rows), recommend(rows[:1]), recommend([])
    (3, 1, None)
    """
    most = max((row.seeks.mean for row in rows), default=0.0)
    return next((row.layer for row in rows if most >= HARDLY and row.seeks.mean >= ENOUGH * most), None)


def _drawn(asked: Sequence[Question], images: int, seed: int) -> list[Question]:
    """A question of each of some images of one size, no two alike."""
    by_image: dict[Path, list[Question]] = {}
    for question in asked:
        by_image.setdefault(question.image, []).append(question)
    (size, _), *_ = Counter(own[0].size for own in by_image.values()).most_common()
    alike = sorted(image for image, own in by_image.items() if own[0].size == size)
    draw = random.Random(seed)
    drawn: dict[str, Question] = {}
    for image in draw.sample(alike, len(alike)):
        new = [question for question in by_image[image] if question.prompt not in drawn]
        if new and len(drawn) < images:
            chosen = draw.choice(new)
            drawn[chosen.prompt] = chosen
    expected = "different ones about at least two images of one size"
    check(len(drawn) > 1, "questions", expected, f"{len(drawn)} of {size[0]} x {size[1]} pixels")
    return list(drawn.values())


def _attention(subject: Subject, group: Sequence[Question], depth: int) -> list[Tensor]:
    """Of each stage from 1 on ``[Q, N]`` float32: what every question's last row pays to the visual tokens, sum 1."""
    seen: dict[int, Tensor] = {}
    policy = Stages([Custom(layer, partial(_note, seen)) for layer in range(1, depth)])
    generate(subject.checkpoint.model, show(subject, group).inputs, policy, max_new_tokens=1)
    return [seen[layer] for layer in range(1, depth)]


def _note(seen: dict[int, Tensor], ctx: TokenContext) -> Tensor:
    """Write down what is attended to, and keep everything: all prompts of a batch show one image."""
    attention = ctx.given("attention")
    seen[ctx.layer] = attention.received(attention.last, normalize="columns").cpu()
    return torch.arange(ctx.mask.shape[1], device=ctx.device).expand(len(ctx.counts), -1)


def _shares(seen: Tensor) -> tuple[list[float], list[float]]:
    """``moves`` and ``seeks`` of each image, from attention ``[images, questions, N]``."""
    best = max(seen.shape[-1] // 4, 1)
    own = _quarter(seen, best)
    foretold = _quarter(_foretold(seen.double() + TINY), best)
    pairs = list(combinations(range(seen.shape[1]), 2))
    shared = torch.stack([(own[:, i] * own[:, j]).sum(-1) for i, j in pairs], 1)
    moves, seeks = (1 - same.mean(1) / best for same in (shared, (own * foretold).sum(-1)))
    return moves.tolist(), seeks.tolist()


def _foretold(seen: Tensor) -> Tensor:
    """What the image with other questions and the question with other images say of each of ``[images, questions, N]``."""
    image, question = seen.sum(1, keepdim=True), seen.sum(0, keepdim=True)
    neither = image.sum(0, keepdim=True) - image - question + seen
    return (image - seen) * (question - seen) / neither


def _quarter(scores: Tensor, best: int) -> Tensor:
    """Marks of the ``best`` tokens of ``scores [..., N]``."""
    return torch.zeros(scores.shape).scatter_(-1, scores.topk(best, dim=-1).indices, 1.0)
