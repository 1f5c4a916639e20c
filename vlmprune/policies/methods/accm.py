"""ACCM: keep few visual tokens, and say in words what the dropped ones showed of what is asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Self

from torch import Tensor

from vlmprune.compensation.captions import captions_of
from vlmprune.compensation.interface import Compensator
from vlmprune.compensation.remembering import Remembering
from vlmprune.compensation.saved import opened, written_at
from vlmprune.errors import check
from vlmprune.policies.base import Needs, PruningPolicy, Reduction, TokenContext
from vlmprune.policies.checks import check_whole, spelt
from vlmprune.policies.parts.described import check_words, described
from vlmprune.policies.parts.prompt_words import Tokenizer
from vlmprune.policies.wrapping import Wrapping, with_keep

WORDING = "additional information: {}\n"


@dataclass(frozen=True)
class ACCM(Wrapping):
    """Keeps what a selection before the language model keeps; a compensator describes the rest, its words join the prompt.

    The paper's compensator is ``vlmprune.compensation.Describer``: a captioner writes ``candidates`` texts from the dropped
    tokens and the question, a selector picks one. Each image gets a text of its own, behind the image and what closes it
    (the authors' code: three tokens behind LLaVA's placeholder, that is behind the line end), in front of the question.

    For every layer the prompt is then one in which these words had been typed and the selection had pruned the images: with
    positions kept, everything behind a text moves up; packed, all rows stand at 0, 1, 2, ... as released. Texts stay in the KV
    cache, so later turns see them. A text is cut off at as many tokens as its image loses, and an image that loses none gets
    none: a pruned prompt is never longer than the prompt. Texts are written once for the same image, kept tokens and question.

    Args:
        selection: a policy that acts before the language model only; ``selected`` is the same with the budget ``keep``.
        compensator: a ``Compensator`` (a function of images and ``candidates``) or the folder of a saved one, loaded when used.
        keep: tokens per image (int; published budgets 288, 144, 72, 36, 18) or share of them (float), in the place of the
            selection's own; None = the selection's.
        candidates: how many texts the compensator writes and chooses from.
        wording: what joins the prompt, with ``{}`` for the text (the authors' has no line end behind it).
        tokenizer: the model's; None = the one saved beside it.
        question: makes of the words behind the image the question that the compensator gets; None = as they are.

    Raises:
        InputError: a setting is out of range; in ``select``, a prompt that asks nothing or has no text behind an image, a
            compensator that returns anything but a text for each image, a tokenizer with tokens that the model has not.
        ModelError: no tokenizer was saved with the model.
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
        check_words(self.wording, self.tokenizer, self.question)
        object.__setattr__(self, "selected", with_keep(inner, self.keep))
        object.__setattr__(self, "_compensator", opened(self.compensator))

    def __repr__(self) -> str:
        """Functions by name, as results go by this text, and a folder with its date: trained further, it says other things."""
        shown = spelt(self)
        if isinstance(self.compensator, str):
            shown["compensator"] += f" of {written_at(self.compensator)}"
        return f"ACCM({', '.join(f'{name}={text}' for name, text in shown.items())})"

    inserts = True

    @property
    def inside(self) -> PruningPolicy:
        return self.selected

    def needs(self, layer: int) -> Needs:
        return super().needs(layer) | Needs(hidden=True, tokens=True)

    def at(self, share: float) -> Self:
        return replace(self, selection=self.selection.at(share), keep=None)

    def forget(self) -> None:
        if isinstance(self._compensator, Remembering):
            self._compensator.clear()

    def select(self, ctx: TokenContext) -> Tensor | Reduction:
        expected = "None with ACCM, which reads whole prompts"
        check(ctx.whole, "prefill_chunk_size", expected, "a prompt in chunks")
        write = partial(captions_of, self._compensator, candidates=self.candidates)
        return described(ctx, self.selected.select(ctx), write, self.wording, self.tokenizer, self.question)
