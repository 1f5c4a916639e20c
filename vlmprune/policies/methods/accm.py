"""ACCM: keep few visual tokens, and say in words what the dropped ones showed of what is asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from time import perf_counter
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from vlmprune.compensation.captions import captions_of
from vlmprune.compensation.interface import Caption, Compensator, Discarded
from vlmprune.compensation.known import Known
from vlmprune.compensation.remembering import Remembering
from vlmprune.compensation.saved import Saved, written_at
from vlmprune.errors import check
from vlmprune.policies.base import Growth, Insertion, Needs, PruningPolicy, Reduction, TokenContext
from vlmprune.policies.checks import check_keep, check_whole, spelt
from vlmprune.policies.parts.prompt_words import (
    Tokenizer,
    is_tokenizer,
    places_behind,
    question_of,
    without_special,
)

WORDING = "additional information: {}\n"
"""What joins a prompt; the authors' has no line end."""


@dataclass(frozen=True)
class ACCM(PruningPolicy):
    """Keeps what a selection before the language model keeps; a compensator describes the rest, its words join the prompt.

    The paper's compensator is ``vlmprune.compensation.Describer``: a captioner writes ``candidates`` texts from the dropped
    tokens and the question, a selector picks one. Each image gets a text of its own, behind the image and what closes it
    (the authors' code: three tokens behind LLaVA's placeholder, that is behind the line end), in front of the question.

    The prompt is then, for every layer, one in which these words had been typed and the selection had pruned the images: with
    positions kept, everything behind a text moves up; packed, all rows stand at 0, 1, 2, ... as released. Texts stay in the KV
    cache, so later turns see them. A text is cut off at as many tokens as its image loses, and an image that loses none gets
    none: a pruned prompt is never longer than the prompt. Texts are written once for the same image, kept tokens and question.

    Args:
        selection: a policy that acts before the language model only.
        compensator: a ``vlmprune.compensation.Compensator``, or the folder of a saved one (loaded when it is first used).
        keep: tokens per image (int; published budgets 288, 144, 72, 36, 18) or share of them (float), in the place of the
            selection's own; None = the selection's.
        candidates: how many texts the compensator writes and chooses from.
        wording: what joins the prompt, with ``{}`` for the text (the authors' has no line end behind it).
        tokenizer: the model's; None = the one saved beside it.
        question: makes of the words behind the image the question that the compensator gets; None = as they are.

    Attributes:
        selected: the selection with this budget.

    Raises:
        InputError: a setting is out of range; in ``select``, a prompt that asks nothing or has no text behind an image, a
            compensator that returns anything but a text for each image, a tokenizer with tokens that the model has not.
        ModelError: no tokenizer was saved with the model.

    Example:
        >>> from vlmprune import ACCM, FasterVLM
        >>> policy = ACCM(selection=FasterVLM(), compensator=lambda images, candidates: ["a red cup"] * len(images))
        >>> policy.kept(576, images=1, layer=0)
        36
    """

    summary = "words for what pruning loses, beside what a selection keeps"
    paper = "Adaptive Content Compensation Method (ACM MM 2025), arXiv 2508.01236; github.com/ASGO-MM/ACCM at c0a73f1"
    formula = (
        "keep what selection does, with the budget keep; then for each image:\n"
        "c = compensator(its x_j, which of them go, the question), the best of its texts  (candidates=3)\n"
        "c in wording, embedded, follows the image; at most as many tokens as the image loses"
    )
    checked = "reading"

    selection: PruningPolicy
    compensator: Compensator | str
    keep: int | float | None = 36
    candidates: int = 3
    wording: str = WORDING
    tokenizer: Tokenizer | None = field(default=None, repr=False)  # pages long
    question: Callable[[str], str] | None = None
    selected: PruningPolicy = field(init=False, repr=False, compare=False)
    _compensator: Compensator = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        inner = self.selection
        before = isinstance(inner, PruningPolicy) and not isinstance(inner, ACCM) and inner.layers == (0,)
        check(before, "selection", "a policy that acts at layer 0 alone", repr(inner))
        check_whole("candidates", self.candidates, 1)
        one = isinstance(self.wording, str) and self.wording.count("{}") == 1
        check(one, "wording", "a text with one {} in it", repr(self.wording))
        told = self.tokenizer is None or is_tokenizer(self.tokenizer)
        check(told, "tokenizer", "a tokenizer (of a processor its .tokenizer), or None", type(self.tokenizer))
        asked = self.question is None or callable(self.question)
        check(asked, "question", "a function of a text, or None", repr(self.question))
        object.__setattr__(self, "selected", self._fitted())
        object.__setattr__(self, "_compensator", self._opened())

    def __repr__(self) -> str:
        """With functions by their names, as typed: an address is another in every run, and results go by this text.

        So a folder is followed by when it was written: trained further, it says something else.
        """
        shown = spelt(self)
        if isinstance(self.compensator, str):
            shown["compensator"] += f" of {written_at(self.compensator)}"
        return f"ACCM({', '.join(f'{name}={text}' for name, text in shown.items())})"

    layers = (0,)  # before the language model
    inserts = True

    @property
    def packs(self) -> bool:
        """Where the selection's tokens stand."""
        return self.selected.packs

    @property
    def growth(self) -> Growth | None:
        """The selection's: what a compensator costs is its own."""
        return self.selection.growth

    @property
    def fixed_count(self) -> bool:
        return self.selected.fixed_count

    def needs(self, layer: int) -> Needs:
        """What the selection reads, the projected features and the prompt's tokens."""
        return self.selected.needs(layer) | Needs(hidden=True, tokens=True)

    def at(self, share: float) -> Self:
        return replace(self, selection=self.selection.at(share), keep=None)

    def spends(self, layer: int) -> str:
        return self.selected.spends(layer)

    def kept(self, tokens: int, images: float, layer: int) -> int:
        return self.selected.kept(tokens, images, layer)

    def forget(self) -> None:
        if isinstance(self._compensator, Remembering):
            self._compensator.clear()

    def select(self, ctx: TokenContext) -> Tensor | Reduction:
        check(
            ctx.whole, "prefill_chunk_size", "None with ACCM, which reads whole prompts", "a prompt in chunks"
        )
        choice = self.selected.select(ctx)
        change = choice if isinstance(choice, Reduction) else Reduction(choice)
        dropped = _dropped(change.index.tolist(), ctx.images())
        if not any(len(image) for sample in dropped for image in sample):
            return choice
        tokenizer = self.tokenizer or ctx.given("tokenizer")()
        start = perf_counter()
        cases = self._cases(ctx, dropped, tokenizer)
        said = captions_of(self._compensator, [case.shown for case in cases], self.candidates)
        texts = tuple(
            _tokens(tokenizer, self.wording, caption, case) for caption, case in zip(said, cases, strict=True)
        )
        return replace(change, inserted=_insertion(ctx, cases, said, texts, perf_counter() - start))

    def _cases(self, ctx: TokenContext, dropped: list[list[list[int]]], tokenizer: Tokenizer) -> list[_Case]:
        """All images, with what is asked of each and where its text goes."""
        hidden = ctx.given("hidden")
        tokens = ctx.given("tokens")
        cases = []
        prompts = zip(tokens.tolist(), ctx.positions.tolist(), ctx.images(), dropped, strict=True)
        for sample, (ids, positions, sizes, lost) in enumerate(prompts):
            if not sizes:
                continue
            firsts = [*accumulate(sizes, initial=0)][:-1]
            images = [(positions[at], positions[at + n - 1]) for at, n in zip(firsts, sizes, strict=True)]
            asked = question_of(ids, images[-1][1], tokenizer)
            asked = asked if self.question is None else self.question(asked)
            said = isinstance(asked, str)
            check(said, "question", "a function that returns a text", f"one that returns {asked!r}")
            check(bool(asked.strip()), f"prompt, sample {sample}", "a question about its images", "none")
            places = places_behind(ids, images, tokenizer)
            for first, n, own, before in zip(firsts, sizes, lost, places, strict=True):
                at = torch.tensor(own, dtype=torch.int64, device=hidden.device)
                cases.append(_Case(sample, before, Discarded(hidden[sample, first : first + n], at, asked)))
        return cases

    def _fitted(self) -> PruningPolicy:
        """The selection with this budget."""
        inner, keep = self.selection, self.keep
        if keep is None:
            return inner
        check_keep(keep)
        if "keep" in inner.__dataclass_fields__:
            return replace(inner, keep=keep)  # type: ignore[call-arg]
        share = isinstance(keep, float)
        check(
            share, "keep", f"a share, or None, with a selection whose budget has other names, {inner!r}", keep
        )
        return inner.at(float(keep))

    def _opened(self) -> Compensator:
        """The compensator behind a memory of what it has said; known texts go by the order of the images, and have none."""
        given = Saved(self.compensator) if isinstance(self.compensator, str) else self.compensator
        check(callable(given), "compensator", "a compensator, or the folder of a saved one", repr(given))
        return given if isinstance(given, Known | Remembering) else Remembering(given)


class _Case(NamedTuple):
    """One image: of which sample, the position its text goes in front of, what a compensator is shown."""

    sample: int
    before: int
    shown: Discarded


def _dropped(index: list[list[int]], sizes: Sequence[Sequence[int]]) -> list[list[list[int]]]:
    """Of each sample's images the places within the image that an index leaves out."""
    out = []
    for kept, own in zip(map(set, index), sizes, strict=True):
        firsts = accumulate(own, initial=0)
        out.append(
            [[i for i in range(n) if first + i not in kept] for first, n in zip(firsts, own, strict=False)]
        )
    return out


def _tokens(tokenizer: Tokenizer, wording: str, caption: Caption, case: _Case) -> list[int]:
    """What joins the prompt: at most as many tokens as the image loses, nothing for an empty text.

    A caption's words are words, whatever stands in it (a reader of signs may have read "</s>").
    """
    text = without_special(caption.text, tokenizer)
    if not text.strip():
        return []
    ids: list[int] = tokenizer(wording.replace("{}", text), add_special_tokens=False)["input_ids"]
    return ids[: len(case.shown.dropped)]


def _joining(caption: Caption, case: _Case) -> Caption:
    """A caption as the report has it: none of an image that loses nothing."""
    return caption if len(case.shown.dropped) else replace(caption, text="")


def _insertion(
    ctx: TokenContext, cases: list[_Case], said: list[Caption], texts: Sequence[list[int]], seconds: float
) -> Insertion:
    """The texts sample by sample, embedded."""
    embed = ctx.given("embed")
    samples = [[i for i, case in enumerate(cases) if case.sample == b] for b in range(len(ctx.counts))]
    rows = [[token for i in own for token in texts[i]] for own in samples]
    width, size = max(map(len, rows)), embed.num_embeddings if isinstance(embed, nn.Embedding) else None
    most = max((token for row in rows for token in row), default=0)
    check(size is None or most < size, "tokenizer", f"the model's, of at most {size} tokens", f"token {most}")
    ids = torch.tensor(
        [[*row, *[0] * (width - len(row))] for row in rows], device=ctx.device, dtype=torch.int64
    )
    return Insertion(
        before=tuple(tuple(cases[i].before for i in own) for own in samples),
        sizes=tuple(tuple(len(texts[i]) for i in own) for own in samples),
        hidden=embed(ids),
        captions=tuple(tuple(_joining(said[i], cases[i]) for i in own) for own in samples),
        seconds=seconds,
    )
