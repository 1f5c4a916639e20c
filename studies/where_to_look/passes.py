"""An ablation: Scout's two waves as two full passes, the second of which starts again with all tokens that Scout would keep."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from vlmprune import Custom, Scout
from vlmprune.eval import Answer, Question
from vlmprune.eval.arms import Arm, PromptSize, cost
from vlmprune.eval.ask import Subject, make_batches, text_lengths
from vlmprune.eval.store import Key
from vlmprune.flops import decoder_flops
from vlmprune.policies.base import PruningPolicy, TokenContext
from where_to_look.scouts import ABLATED

TWO_PASSES = f"{ABLATED} diverse, two full passes"
OF = "Scout, diverse"
"""Whose tokens they keep."""


@dataclass(frozen=True)
class TwoPasses(Arm):
    """An arm that is told which tokens to keep: in its one pass coarse tokens see fine ones, which is all that differs.

    Attributes:
        policy: the Scout that has chosen them.
        sets: of each batch in turn, for each question, the tokens' ordinals, ascending.
    """

    sets: tuple[tuple[tuple[int, ...], ...], ...] = ()

    @property
    def key(self) -> str:
        """Scout's settings say which tokens these are."""
        return f"two full passes of {self.policy!r}"

    def for_batch(self, number: int, regions: Sequence[object]) -> PruningPolicy | None:
        """A plain stage before the language model that keeps this batch's."""
        rows = [torch.tensor(some) for some in self.sets[number]]
        index = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)

        def told(ctx: TokenContext) -> torch.Tensor:
            return index.to(ctx.device)

        return Custom(layer=0, select=told)


def two_passes(
    subject: Subject, questions: Sequence[Question], arms: Sequence[Arm], answers: Mapping[Key, Answer]
) -> list[TwoPasses]:
    """An arm for each of the Scouts among ``arms`` that are called ``OF``, whose ``answers`` are all there."""
    batches = make_batches(subject.checkpoint.processor, questions, subject.batch_size)
    out = []
    for arm in arms:
        if arm.method == OF:
            sets = [
                tuple(tokens(answers[arm.key, question.id, arm.seed]) for question in batch)
                for batch in batches
            ]
            out.append(TwoPasses(TWO_PASSES, arm.budget, arm.policy, sets=tuple(sets)))
    return out


def tokens(answer: Answer) -> tuple[int, ...]:
    """The ordinals of the visual tokens that survived the last stage."""
    bits = int(answer.kept[-1][1], 16)
    return tuple(i for i in range(bits.bit_length()) if bits >> i & 1)


def charged(
    subject: Subject,
    questions: Sequence[Question],
    prompt: PromptSize,
    arms: Sequence[TwoPasses],
    answers: Mapping[Key, Answer],
) -> Iterator[Answer]:
    """Their answers with the true cut: the store's is the second pass alone; the first, of Scout's coarse tokens, comes on top."""
    texts = text_lengths(subject.checkpoint.processor, questions)
    for arm in arms:
        scout = arm.policy
        assert isinstance(scout, Scout)
        early = replace(prompt.shape, layers=scout.look)
        for question, text in zip(questions, texts, strict=True):
            answer = answers[arm.key, question.id, arm.seed]
            seen = answers[repr(scout), question.id, arm.seed].kept[0][1]
            first = decoder_flops(early, [int(seen, 16).bit_count() + text] * scout.look)
            asked = replace(prompt, text=text)
            cut, _ = cost(asked, [(0, len(tokens(answer)))], spent=first)
            yield replace(answer, cut=round(cut, 6))
