"""Asks every question of every arm, in batches, and writes each answer down as it comes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL.Image import Image

from vlmprune import __version__
from vlmprune.checkpoints import Checkpoint, build_text, generate, has_bos, is_visual, make_inputs
from vlmprune.errors import InputError
from vlmprune.eval.arms import Arm, PromptSize, cost
from vlmprune.eval.questions import FILE, Question
from vlmprune.eval.scoring import judge
from vlmprune.eval.store import Answer, Store
from vlmprune.models import Run, check_videos
from vlmprune.models.host.parts import decoder_shape
from vlmprune.policies.base import PruningPolicy
from vlmprune.smaller import Shown, Smaller, SmallPictures, as_they_are


@dataclass(frozen=True)
class Subject:
    """Who is asked, how many questions at once, and how long an answer may be."""

    checkpoint: Checkpoint
    batch_size: int
    max_new_tokens: int

    @cached_property
    def pictures(self) -> SmallPictures:
        """What makes pictures smaller for it. Raises ModelError for a family whose pictures cannot be."""
        return SmallPictures(self.checkpoint.config, self.checkpoint.processor)

    def settings(self, questions: Path) -> dict[str, Any]:
        """All that answers to a folder of questions depend on besides policy, question and seed.

        A folder of results belongs to one such set. Images are told by their names, which stand among the questions.
        """
        checkpoint = self.checkpoint
        return {
            "version": __version__,
            "model": checkpoint.source,
            "weights": fingerprint(checkpoint.model),
            "questions": hashlib.sha256((questions / FILE).read_bytes()).hexdigest()[:16],
            "template": hashlib.sha256(str(checkpoint.processor.chat_template).encode()).hexdigest()[:16],
            "device": checkpoint.device,
            "dtype": checkpoint.dtype,
            "attention": checkpoint.attention,
            "batch_size": self.batch_size,
            "max_new_tokens": self.max_new_tokens,
        }


def fingerprint(model: Any) -> str:
    """Differs between checkpoints that were trained differently: a hash of some values of every weight."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        some = weight.detach().flatten()[:64].float().cpu()
        digest.update(name.encode() + some.numpy().tobytes())
    return digest.hexdigest()[:16]


def with_template(checkpoint: Checkpoint, questions: Sequence[Question]) -> list[Question]:
    """The questions, with one image placeholder token and all else that the chat template adds in their prompts.

    Everything below takes such questions.

    Raises:
        InputError: a prompt that does not fit, with the question's id; clips, for a model without videos.
    """
    if any(question.kind == "video" for question in questions):
        check_videos(checkpoint.config, "questions")
    out, processor = [], checkpoint.processor
    for question in questions:
        try:
            out.append(replace(question, prompt=build_text(processor, question.prompt, 1, question.kind)))
        except InputError as error:
            raise InputError(f"question {question.id!r}: {error}") from error
    return out


def make_batches(processor: Any, questions: Sequence[Question], size: int) -> list[list[Question]]:
    """Batches of prompts as equal in length as can be, so that next to nothing is padded.

    The same questions and size give the same batches, also when some are answered already: a batch is asked as a whole, so
    an answer does not depend on where an earlier run was killed.
    """
    lengths = text_lengths(processor, questions)
    order = sorted(range(len(questions)), key=lambda i: (lengths[i], i))
    return [[questions[i] for i in order[at : at + size]] for at in range(0, len(order), size)]


def text_lengths(processor: Any, questions: Sequence[Question]) -> list[int]:
    """Text tokens of every prompt."""
    texts = [question.prompt for question in questions]
    ids = processor.tokenizer(texts, add_special_tokens=not has_bos(processor, texts))["input_ids"]
    return [len(row) - 1 for row in ids]  # but for the image placeholder


def typical_prompt(checkpoint: Checkpoint, questions: Sequence[Question]) -> PromptSize:
    """The prompt that budgets are counted for: the first question's visual tokens, the mean text."""
    ids = batch_inputs(checkpoint.processor, questions[:1])["input_ids"]
    lengths = text_lengths(checkpoint.processor, questions)
    visual = int(is_visual(checkpoint.config, ids).sum())
    return PromptSize(decoder_shape(checkpoint.config), visual, round(sum(lengths) / len(lengths)))


def batch_inputs(processor: Any, questions: Sequence[Question]) -> Any:
    """Token ids, padded on the left, and pixel values of a batch about images, or about clips, on the CPU.

    Raises:
        InputError: an image that cannot be read, or that the processor does not take.
    """
    texts, pictures, name = _asked(questions)
    if any(question.kind == "video" for question in questions):
        return make_inputs(processor, texts, [], name, clips=pictures)
    return make_inputs(processor, texts, pictures, name)


def _asked(questions: Sequence[Question]) -> tuple[list[str], list[list[Image]], str]:
    """Texts and pictures of a batch, and what errors call it."""
    texts = [question.prompt for question in questions]
    pictures = [question.pictures() for question in questions]
    return texts, pictures, f"questions {', '.join(question.id for question in questions)}"


def show(subject: Subject, questions: Sequence[Question], smaller: Smaller | None = None) -> Shown:
    """A batch on the device, its pictures as they are or smaller. Errors as ``batch_inputs``."""
    checkpoint = subject.checkpoint
    if smaller is not None:
        texts, images, name = _asked(questions)
        shown = subject.pictures.inputs(texts, images, smaller.keep, name)
    else:
        shown = as_they_are(checkpoint.config, batch_inputs(checkpoint.processor, questions))
    return shown.to(checkpoint.model.device, checkpoint.model.dtype)


def missing(questions: Sequence[Question], arms: Sequence[Arm], store: Store) -> int:
    """How many answers are still to come."""
    keys = {(arm.key, question.id, arm.seed) for arm in arms for question in questions}
    return len(keys - store.answers.keys())


def ask_all(
    subject: Subject, questions: Sequence[Question], arms: Sequence[Arm], store: Store
) -> Iterator[Answer]:
    """Every answer the store does not have yet, in the store before it is handed on. Arms take turns batch by batch."""
    warm: set[str] = set()
    batches = make_batches(subject.checkpoint.processor, questions, subject.batch_size)
    for number, batch in enumerate(batches):
        open_arms = [arm for arm in arms if missing(batch, [arm], store)]
        if not open_arms:
            continue
        whole = show(subject, batch)
        for arm in open_arms:
            shown = whole if arm.smaller is None else show(subject, batch, arm.smaller)
            policy = arm.for_batch(number, [question.region for question in batch])
            if arm.key not in warm:  # kernels and caches are made in the first pass, which is not timed
                _generate(subject, shown, arm, policy, 1)
                warm.add(arm.key)
            for answer in _answers(subject, batch, shown, arm, policy):
                if answer.key not in store.answers:
                    store.add(answer)
                    yield answer


def _generate(
    subject: Subject, shown: Shown, arm: Arm, policy: PruningPolicy | None, longest: int
) -> tuple[Run, Any]:
    """One batch, answered by one arm."""
    model = subject.checkpoint.model
    with subject.pictures.tower(model) if arm.smaller is not None else nullcontext():
        return generate(model, shown.inputs, policy, max_new_tokens=longest)


def _answers(
    subject: Subject, batch: Sequence[Question], shown: Shown, arm: Arm, policy: PruningPolicy | None
) -> Iterator[Answer]:
    """The answers of one arm to one batch, scored and with their cost, padding not counted."""
    checkpoint = subject.checkpoint
    run, new = _generate(subject, shown, arm, policy, subject.max_new_tokens)
    texts = checkpoint.processor.tokenizer.batch_decode(new, skip_special_tokens=True)
    report, shape = run.report(), decoder_shape(checkpoint.config)
    prefill, second = report.seconds.prefill / len(batch), report.second_wave
    lengths = shown.inputs["attention_mask"].sum(1).tolist()
    for sample, (question, said) in enumerate(zip(batch, texts, strict=True)):
        kept = [(stage.layer, run.kept_at(i, sample).tolist()) for i, stage in enumerate(run.stages)]
        prompt = PromptSize(shape, shown.whole[sample], lengths[sample] - shown.shown[sample])
        stages = [(layer, len(some)) for layer, some in kept]
        if arm.smaller is not None:  # every layer sees so many of them
            stages = [(0, shown.shown[sample])]
        wave = None if second is None else (second.layer, second.rows[sample])
        cut, tokens = cost(prompt, stages, *_joined(run, sample), wave)
        right, exact = judge(said, question.answer)
        yield Answer(
            policy=arm.key,
            question=question.id,
            seed=arm.seed,
            answer=said.strip(),
            right=right,
            exact=exact,
            cut=round(cut, 6),
            tokens=round(tokens, 3),
            prefill=round(prefill, 7),
            kept=tuple((layer, format(sum(1 << i for i in some), "x")) for layer, some in kept),
        )


def _joined(run: Run, sample: int) -> tuple[int, int]:
    """Rows of the texts that joined a sample's prompt, and FLOPs that writing them took."""
    texts = run.inserted
    if texts is None:
        return 0, 0
    return sum(texts.sizes[sample]), sum(caption.flops for caption in texts.captions[sample])
