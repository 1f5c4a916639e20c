"""Asks the questions of a study, and turns bad input into one line and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.progress import track
from transformers.utils import logging

from vlmprune.errors import InputError, ModelError
from vlmprune.eval import Question
from vlmprune.eval.arms import Arm
from vlmprune.eval.ask import Subject, ask_all, missing
from vlmprune.eval.store import Store


def ask(subject: Subject, questions: Sequence[Question], arms: Sequence[Arm], store: Store) -> None:
    """Fill the store under a progress bar, on stderr and only on a terminal."""
    bar = Console(stderr=True)
    answers, total = ask_all(subject, questions, arms, store), missing(questions, arms, store)
    for _ in track(answers, "answers", total, console=bar, transient=True, disable=not bar.is_terminal):
        pass


def first(questions: Sequence[Question], limit: int | None) -> list[Question]:
    """The first ``limit`` questions of every family, None = all of them."""
    asked: dict[str, int] = {}
    out = []
    for question in questions:
        asked[question.family] = asked.get(question.family, 0) + 1
        if limit is None or asked[question.family] <= limit:
            out.append(question)
    return out


def exit_code(study: Callable[[], None]) -> int:
    """Run a study without transformers' chatter: 0, or 2 for bad input, with one line that says what was expected."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        study()
    except (InputError, OSError, ModelError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
