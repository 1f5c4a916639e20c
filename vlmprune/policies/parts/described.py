"""Words for what a choice drops: each image gets a text, made of what it loses and what is asked, that joins its prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vlmprune.compensation.interface import Caption, Discarded
from vlmprune.errors import check
from vlmprune.policies.base import Insertion, Reduction, TokenContext
from vlmprune.policies.parts.prompt_words import (
    Tokenizer,
    is_tokenizer,
    places_behind,
    question_of,
    without_special,
)

Question = Callable[[str], str]
"""Makes of what a prompt asks what is shown of it."""


class Case(NamedTuple):
    """One image: of which sample, the position its text goes in front of, what a compensator is shown."""

    sample: int
    before: int
    shown: Discarded


def check_words(wording: object, tokenizer: object, question: object) -> None:
    """``wording`` is a text with one place in it; ``tokenizer`` is one and ``question`` a function, or they are None."""
    one = isinstance(wording, str) and wording.count("{}") == 1
    check(one, "wording", "a text with one {} in it", repr(wording))
    told = tokenizer is None or is_tokenizer(tokenizer)
    check(told, "tokenizer", "a tokenizer (of a processor its .tokenizer), or None", type(tokenizer))
    asked = question is None or callable(question)
    check(asked, "question", "a function of a text, or None", repr(question))


def described(
    ctx: TokenContext,
    choice: Tensor | Reduction,
    write: Callable[[Sequence[Discarded]], Sequence[Caption]],
    wording: str,
    tokenizer: Tokenizer | None,
    question: Question | None,
) -> Tensor | Reduction:
    """The choice, with a text behind each image that loses tokens; unchanged where none does.

    Args:
        ctx: the stage's context, with the prompts' tokens.
        choice: what stays.
        write: a caption for each image of all prompts.
        wording: what joins a prompt, with ``{}`` for the text.
        tokenizer: None = the context's.
        question: None = as it is asked.

    Raises:
        InputError: a prompt that asks nothing or has no text behind an image, a question made into no text, a tokenizer with
            tokens that the model has not.
    """
    change = choice if isinstance(choice, Reduction) else Reduction(choice)
    dropped = _dropped(change.index.tolist(), ctx.images())
    if not any(image for sample in dropped for image in sample):
        return choice
    tokenizer = tokenizer or ctx.given("tokenizer")()
    start = perf_counter()
    cases = _cases(ctx, dropped, tokenizer, question)
    said = write([case.shown for case in cases])
    texts = [_tokens(tokenizer, wording, caption, case) for caption, case in zip(said, cases, strict=True)]
    return replace(change, inserted=_insertion(ctx, cases, said, texts, perf_counter() - start))


def _dropped(index: list[list[int]], sizes: Sequence[Sequence[int]]) -> list[list[list[int]]]:
    """Of each sample's images the places within the image that an index leaves out."""
    out = []
    for kept, own in zip(map(set, index), sizes, strict=True):
        firsts = accumulate(own, initial=0)
        out.append(
            [[i for i in range(n) if first + i not in kept] for first, n in zip(firsts, own, strict=False)]
        )
    return out


def _cases(
    ctx: TokenContext, dropped: list[list[list[int]]], tokenizer: Tokenizer, question: Question | None
) -> list[Case]:
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
        asked = asked if question is None else question(asked)
        said = isinstance(asked, str)
        check(said, "question", "a function that returns a text", f"one that returns {asked!r}")
        check(bool(asked.strip()), f"prompt, sample {sample}", "a question about its images", "none")
        places = places_behind(ids, images, tokenizer)
        for first, n, own, before in zip(firsts, sizes, lost, places, strict=True):
            at = torch.tensor(own, dtype=torch.int64, device=hidden.device)
            cases.append(Case(sample, before, Discarded(hidden[sample, first : first + n], at, asked)))
    return cases


def _tokens(tokenizer: Tokenizer, wording: str, caption: Caption, case: Case) -> list[int]:
    """What joins the prompt: at most as many tokens as the image loses, nothing for an empty text.

    A caption's words are words, whatever stands in it (a reader of signs may have read "</s>").
    """
    text = without_special(caption.text, tokenizer)
    if not text.strip():
        return []
    ids: list[int] = tokenizer(wording.replace("{}", text), add_special_tokens=False)["input_ids"]
    return ids[: len(case.shown.dropped)]


def _joining(caption: Caption, case: Case) -> Caption:
    """A caption as the report has it: none of an image that loses nothing."""
    return caption if len(case.shown.dropped) else replace(caption, text="")


def _insertion(
    ctx: TokenContext,
    cases: Sequence[Case],
    said: Sequence[Caption],
    texts: Sequence[list[int]],
    seconds: float,
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
