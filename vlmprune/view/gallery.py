"""The gallery: every method at the same budgets on the same questions, what it keeps and whether it answers right."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from vlmprune.checkpoints import Checkpoint
from vlmprune.errors import InputError, check
from vlmprune.eval.questions import Question, read_questions
from vlmprune.eval.scoring import judge
from vlmprune.images import open_rgb
from vlmprune.policies.base import Grid
from vlmprune.policies.registry import load_policies, policy_class
from vlmprune.progress import Progress, silent
from vlmprune.view.fitting import Fitted, Size, fit
from vlmprune.view.outcome import Outcome, run_once
from vlmprune.view.scene import make_ready, seen, size_of
from vlmprune.view.sheets import Frame, contact_sheet, strip

BUDGETS = (192.0, 128.0, 64.0)
NAME, SHEET = "gallery.json", "sheet.webp"


@dataclass(frozen=True)
class Exhibit:
    """One answer of one method.

    Attributes:
        method: its name.
        policy: as typed; "" = unpruned.
        budget: visual tokens it was fitted to, a mean over the inputs of the layers; None = unpruned.
        meets: whether it can meet it (``vlmprune.view.fitting.Fitted``).
        question: the question's id.
        answer: the model's.
        right: whether that is the true one.
        mean: visual tokens of this run, a mean over the inputs of the layers.
        kept: numbers (raster order) of the visual tokens that survive the last stage.
    """

    method: str
    policy: str
    budget: float | None
    meets: bool
    question: str
    answer: str
    right: bool
    mean: float
    kept: tuple[int, ...]


@dataclass(frozen=True)
class Scene:
    """A question made ready: the picture as the model sees it, its grid of tokens, what settings depend on, and the inputs."""

    question: Question
    seen: Image.Image
    grid: Grid
    size: Size
    inputs: Any


def make_gallery(
    checkpoint: Checkpoint,
    questions: Path,
    out: Path,
    budgets: Sequence[float] = BUDGETS,
    methods: Sequence[str] = (),
    max_new_tokens: int = 16,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Ask every method every question at every budget, and draw what it keeps.

    Writes into ``out`` one strip a method (``fastv.webp``: a row a question, a column a budget), ``sheet.webp`` with all methods on
    the first question, and ``gallery.json`` with every answer and policy.

    Args:
        checkpoint: with one tile an image (LLaVA and its like).
        questions: folder with a ``questions.jsonl``; every question is asked.
        out: folder, made if it is not there.
        budgets: visual tokens of one image, a mean over the inputs of the decoder's layers.
        methods: names; empty: all that are known.
        max_new_tokens: longest answer.
        progress: is told what is done, how far it is, and of how many.

    Returns:
        What ``gallery.json`` holds; under ``left_out`` why a method is: it has to be given settings, has none that a budget
        could change, or is made for video.

    Raises:
        InputError: bad questions or budgets, an unknown method, or a model that does not see a picture as one grid of tokens.
        ModelError: a checkpoint that cannot be pruned.
    """
    wanted = list(methods) or list(load_policies()[0])
    scenes = [ready(checkpoint, question) for question in read_questions(questions)]
    size = scenes[0].size
    _check_budgets(budgets, size)
    fitted, left_out = fit_all(wanted, budgets, size, given=bool(methods))
    out.mkdir(parents=True, exist_ok=True)
    shown = {"": [_exhibit(checkpoint, scene, "", None, None, max_new_tokens) for scene in scenes]}
    for done, (name, policies) in enumerate(fitted.items()):
        progress(name, done, len(fitted))
        shown[name] = [
            _exhibit(checkpoint, scene, name, budget, policy, max_new_tokens)
            for scene in scenes
            for budget, policy in policies.items()
        ]
    _draw(shown, scenes, budgets, out)
    told = [{"method": name, "why": why} for name, why in left_out.items()]
    rows = [asdict(one) for some in shown.values() for one in some]
    asked = [{"id": s.question.id, "prompt": s.question.prompt, "answer": s.question.answer} for s in scenes]
    settings = {"model": checkpoint.source, "visual_tokens": size.visual, "layers": size.layers}
    data = {**settings, "budgets": list(budgets), "questions": asked, "left_out": told, "answers": rows}
    (out / NAME).write_text(json.dumps(data, indent=1) + "\n")
    return data


def _check_budgets(budgets: Sequence[float], size: Size) -> None:
    expected = f"different numbers of visual tokens from 1 to {size.visual}"
    fine = len(budgets) > 0 and all(1 <= budget <= size.visual for budget in budgets)
    check(fine and len(set(budgets)) == len(budgets), "budgets", expected, ", ".join(map(str, budgets)))


def ready(checkpoint: Checkpoint, question: Question) -> Scene:
    """A question as the checkpoint sees it. Raises InputError for one that does not see a picture as one grid of tokens."""
    inputs = make_ready(checkpoint, question.prompt, open_rgb(question.image, "questions"), "questions")
    image, grid = seen(checkpoint, inputs)
    check(image is not None, "checkpoint", "one that sees a picture as one grid of tokens", checkpoint.source)
    assert image is not None
    size = size_of(checkpoint, inputs)
    return Scene(question, image, grid, size, inputs.to(checkpoint.device, dtype=checkpoint.model.dtype))


def fit_all(
    names: Sequence[str], budgets: Sequence[float], size: Size, given: bool
) -> tuple[dict[str, dict[float, Fitted]], dict[str, str]]:
    """Every method at every budget, and why others are left out; one that was asked for by name is not."""
    fitted, left_out = {}, {}
    for name in names:
        if policy_class(name).for_video and not given:
            left_out[name] = f"{name}: made for video"
            continue
        try:
            fitted[name] = {budget: fit(name, budget, size) for budget in budgets}
        except InputError as error:
            if given:
                raise
            left_out[name] = str(error)
    return fitted, left_out


def _exhibit(
    checkpoint: Checkpoint, scene: Scene, name: str, budget: float | None, fitted: Fitted | None, limit: int
) -> Exhibit:
    policy, text = (None, "") if fitted is None else (fitted.policy, fitted.text)
    outcome = run_once(checkpoint, scene.inputs, text or None, policy, limit)
    return Exhibit(
        method=name,
        policy=text,
        budget=budget,
        meets=fitted is None or fitted.meets,
        question=scene.question.id,
        answer=outcome.answer,
        right=judge(outcome.answer, scene.question.answer)[0],
        mean=outcome.report.tokens.mean_per_layer,
        kept=_last(outcome, scene.grid),
    )


def _last(outcome: Outcome, grid: Grid) -> tuple[int, ...]:
    return outcome.kept[-1] if outcome.kept else tuple(range(grid[0] * grid[1]))


def _draw(
    shown: dict[str, list[Exhibit]], scenes: Sequence[Scene], budgets: Sequence[float], out: Path
) -> None:
    """One strip a method, and the contact sheet of the first question."""

    def frame(one: Exhibit, scene: Scene) -> Frame:
        tokens = f"{len(one.kept)} of {scene.grid[0] * scene.grid[1]}"
        note = "" if one.meets else f", mean {one.mean:.0f}"
        kept = frozenset(one.kept)
        return Frame(scene.seen, scene.grid, kept, tokens + note, not one.meets, one.answer, one.right)

    cells = {}
    for name, some in shown.items():
        if name:
            rows = [some[i * len(budgets) : (i + 1) * len(budgets)] for i in range(len(scenes))]
            cells[name] = [
                [frame(one, scene) for one in (first, *row)]
                for scene, first, row in zip(scenes, shown[""], rows, strict=True)
            ]
    prompts = [f"{s.question.prompt}  ({s.question.answer})" for s in scenes]
    heads = [f"{budget:g}" for budget in budgets]
    for name, rows_of in cells.items():
        strip(prompts, ["unpruned", *heads], rows_of).save(out / f"{name}.webp", quality=80)
    firsts = {name: rows_of[0][1:] for name, rows_of in cells.items()}
    sheet = contact_sheet(prompts[0], heads, frame(shown[""][0], scenes[0]), firsts)
    sheet.save(out / SHEET, quality=80)
