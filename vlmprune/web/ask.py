"""One question, asked without pruning and then with each method at one budget; what is found so far, again and again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from PIL import Image

from vlmprune.checkpoints import Checkpoint
from vlmprune.errors import BackendError, InputError, ModelError, NotPrunedError, check
from vlmprune.policies.base import Grid
from vlmprune.view.fitting import Fitted, Size
from vlmprune.view.outcome import Outcome, median, run_once
from vlmprune.view.scene import make_ready, seen, size_of
from vlmprune.web.desk import Desk, fitted

TIMED = 3
EXPECTED = (InputError, ModelError, NotPrunedError, BackendError)
"""What a method may raise for this model and budget; it is then told in its column."""


@dataclass(frozen=True)
class Asked:
    """What a visitor asks, checked.

    Attributes:
        checkpoint: of whom.
        picture: upright, RGB.
        file: what a command calls it.
        prompt: the question.
        methods: names, in the order of their columns.
        budget: visual tokens of the image, a mean over the inputs of the decoder's layers.
    """

    checkpoint: Checkpoint
    picture: Image.Image
    file: str
    prompt: str
    methods: tuple[str, ...]
    budget: float


@dataclass(frozen=True)
class Column:
    """What one method gave, "" = without pruning; where it cannot be, ``fault`` says why and there is no outcome."""

    method: str
    fitted: Fitted | None = None
    outcome: Outcome | None = None
    fault: str = ""


@dataclass(frozen=True)
class Results:
    """What is found so far.

    Attributes:
        question: that was asked.
        size: of the model, and the visual tokens of the image.
        limit: tokens of the longest answer.
        seen: the picture as the model sees it; None = it is not one grid of tokens, and not drawn.
        grid: visual tokens of the picture, rows and columns.
        columns: one for no pruning, then one a method.
        doing: what is done now; "" = all is there.
    """

    question: Asked
    size: Size
    limit: int
    seen: Image.Image | None
    grid: Grid
    columns: tuple[Column, ...] = field(default=())
    doing: str = ""


def answers(desk: Desk, question: Asked) -> Iterator[Results]:
    """Ask; yields before the model is loaded, before each method, and at the end.

    Every method has one untimed run, which compiles and warms up, and ``TIMED`` timed ones, whose median is told.

    Raises:
        InputError, ModelError: the question or the checkpoint as a whole cannot be.
    """
    checkpoint = question.checkpoint
    inputs = make_ready(checkpoint, question.prompt, question.picture)
    results = _before(desk, question, inputs)
    yield replace(results, doing=f"Loading {checkpoint.source}")
    with desk.turn:
        inputs = inputs.to(checkpoint.device, dtype=checkpoint.model.dtype)
    for method in ("", *question.methods):
        yield replace(results, doing=f"Asking {method or 'without pruning'}")
        with desk.turn:
            column = _column(checkpoint, inputs, method, question.budget, results.size, desk.limit)
        results = replace(results, columns=(*results.columns, column))
    yield results


def _before(desk: Desk, question: Asked, inputs: Any) -> Results:
    """Results without a column. A picture is drawn where it becomes one grid of tokens."""
    checkpoint = question.checkpoint
    size = size_of(checkpoint, inputs)
    check(question.budget <= size.visual, "budget", f"at most {size.visual} visual tokens", question.budget)
    image, grid = seen(checkpoint, inputs)
    return Results(question, size, desk.limit, image, grid)


def _column(
    checkpoint: Checkpoint, inputs: Any, method: str, budget: float, size: Size, limit: int
) -> Column:
    try:
        found = fitted(checkpoint, method, budget, size) if method else None
        policy, label = (found.policy, found.text) if found else (None, None)
        runs = [run_once(checkpoint, inputs, label, policy, limit) for _ in range(1 + TIMED)]
    except EXPECTED as error:
        return Column(method, fault=str(error))
    return Column(method, found, median(runs[1:]))
