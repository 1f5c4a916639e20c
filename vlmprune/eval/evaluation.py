"""A whole evaluation: checks everything, asks every question of every policy, writes tables, plots and a page."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmprune.checkpoints import Checkpoint, check_padding
from vlmprune.errors import InputError, ModelError, check
from vlmprune.eval.arms import BASELINES, ORACLE, Arm, groups_of, make_arms
from vlmprune.eval.ask import Subject, ask_all, missing, typical_prompt, with_template
from vlmprune.eval.oracle import check_oracle
from vlmprune.eval.page import make_page
from vlmprune.eval.plots import check_matplotlib, draw_families, draw_heat, draw_pareto
from vlmprune.eval.questions import Question, read_questions
from vlmprune.eval.store import Answer, Key, Store, check_out, write
from vlmprune.eval.summary import Result, answers_of, kept_share, summarize
from vlmprune.models import patch_grid
from vlmprune.policies.base import PruningPolicy
from vlmprune.policies.recipe import named
from vlmprune.progress import Progress, silent

BUDGETS = (0.48, 0.64)
"""FLOPs cuts where none are given: those of FEATHER's tables."""


@dataclass(frozen=True)
class Evaluation:
    """What came out.

    Attributes:
        settings: all that the answers depend on, the prompt that budgets were counted for, and what could not be run and why.
        results: one per method and budget, the unpruned model first.
        answers: every answer, by policy with its settings, question id and seed.
        speed: answers per second, everything included; None if all of them were there already.
        page: the HTML file that shows it all.
    """

    settings: Mapping[str, Any]
    results: Sequence[Result]
    answers: Mapping[Key, Answer]
    speed: float | None
    page: Path


def run(
    checkpoint: Checkpoint,
    questions: Path | str,
    out: Path | str,
    policies: Sequence[str | PruningPolicy] = (),
    *,
    budgets: Sequence[float] = BUDGETS,
    families: Sequence[str] = (),
    baselines: bool | Sequence[str] = True,
    oracle: bool = False,
    seeds: int = 3,
    batch_size: int = 16,
    max_new_tokens: int = 32,
    progress: Progress = silent,
) -> Evaluation:
    """Accuracy of policies at equal FLOPs on a set of questions: what ``vlmprune eval`` does, without printing.

    All that can fail is checked before the weights are loaded.

    Args:
        checkpoint: whom to ask.
        questions: folder with a ``questions.jsonl`` and its images.
        out: folder for results, in an existing one; what is answered there already is not asked again.
        policies: as objects, or as typed on the command line.
        budgets: shares of the prefill's FLOPs to save, for each of which every policy's ``keep`` is fitted; empty: the
            policies keep what they say, and the baselines are fitted to their cuts.
        families: only these families of questions; empty: all.
        baselines: names of ``BASELINES``, evenly spaced tokens ("lattice", "raster"), "random" ones, and pictures made
            "smaller" instead; True: all, and where one cannot meet a policy's cut, or pictures cannot be made so small, the
            settings say why; False: none.
        oracle: also one that is told where the answer is seen.
        seeds: draws of each policy that draws.
        batch_size: questions asked at once.
        max_new_tokens: longest answer.
        progress: called at every step and answer.

    Raises:
        InputError: bad input, a policy or named baseline that cannot meet a budget, or results of other settings in ``out``.
        ModelError: a model that cannot be pruned, whose patches the oracle cannot match to boxes, or whose pictures
            cannot be made smaller.
        OSError: a file cannot be written.

    Not run here, as it needs questions (``examples/glyphworld/make_questions.py`` makes some):

    >>> found = run(Checkpoint("model"), "questions", "results", ["fastv:layer=2"])  # doctest: +SKIP
    """
    questions, out = Path(questions), Path(out)
    check_matplotlib()
    for name, count in (("seeds", seeds), ("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
        check(count >= 1, name, "at least 1", count)
    cuts = tuple(dict.fromkeys(budgets))
    fine = all(0 < cut < 1 for cut in cuts)
    check(fine, "budgets", "FLOPs cuts between 0 and 1", ",".join(f"{cut:g}" for cut in cuts))
    asked = read_questions(questions, families)
    methods = named(policies)
    check_out(out)
    checkpoint.check_depth(methods.values())
    if oracle:
        check_oracle(asked, checkpoint.config, checkpoint.processor)
    check_padding(checkpoint.processor, min(batch_size, len(asked)))
    asked = with_template(checkpoint, asked)
    prompt = typical_prompt(checkpoint, asked)
    names = tuple(dict.fromkeys(BASELINES if baselines is True else baselines or ()))
    known = all(name in BASELINES for name in names)
    check(known, "baselines", f"some of {', '.join(BASELINES)}", ", ".join(names))
    left_out: list[str] | None = [] if baselines is True else None
    arms = make_arms(methods, cuts, names + (ORACLE,) * oracle, seeds, prompt, left_out)
    subject = Subject(checkpoint, batch_size, max_new_tokens)
    arms = _possible(subject, arms, asked, left_out)
    checkpoint.check_depth(arm.policy for arm in arms if arm.policy is not None)
    progress(f"loading {checkpoint.source}", 0, 0)
    settings = subject.settings(questions)
    store = Store(out, settings)
    total, start = missing(asked, arms, store), time.perf_counter()
    progress("answers", 0, total)
    for done, _ in enumerate(ask_all(subject, asked, arms, store), 1):
        progress("answers", done, total)
    speed = total / (time.perf_counter() - start) if total else None
    progress("drawing", 0, 0)
    results = summarize(asked, arms, store.answers)
    settings |= {
        "text_tokens": prompt.text,
        "visual_tokens": prompt.visual,
        "precision": checkpoint.precision,
    }
    settings |= {"left_out": "; ".join(left_out)} if left_out else {}
    page = _write_all(out, settings, results, _heat(checkpoint.config, arms, asked, store.answers))
    return Evaluation(settings, results, store.answers, speed, page)


def _possible(
    subject: Subject, arms: Sequence[Arm], questions: Sequence[Question], left_out: list[str] | None
) -> list[Arm]:
    """The arms without those whose pictures cannot be made so small; ``left_out`` takes why not, None: an error."""
    sizes = dict.fromkeys(question.size for question in questions)
    possible = []
    for arm in arms:
        try:
            if arm.smaller is not None:
                still = all(question.kind == "image" for question in questions)
                check(still, "smaller", "questions about images", "clips")
                for size in sizes:
                    subject.pictures.plan(size, arm.smaller.keep)
            possible.append(arm)
        except (InputError, ModelError) as error:
            if left_out is None:
                raise
            left_out.append(f"{arm.method} at {arm.budget:.1%}: {error}")
    return possible


def _heat(
    config: Any, arms: Sequence[Arm], questions: Sequence[Question], answers: Mapping[Key, Answer]
) -> dict[str, Any]:
    """Title -> where the method keeps tokens; empty for models whose images do not share one grid."""
    try:
        grid = patch_grid(config)
    except ModelError:
        return {}
    return {
        method if budget is None else f"{method} at {budget:.1%}": kept_share(
            answers_of(draws, questions, answers), grid
        )
        for (method, budget), draws in groups_of(arms).items()
        if draws[0].policy is not None
    }


def _write_all(
    folder: Path, settings: Mapping[str, Any], results: Sequence[Result], heat: Mapping[str, Any]
) -> Path:
    """Write results.json, the pictures and the page, whose path is returned."""
    pictures = {
        "Accuracy against cost": draw_pareto(results),
        "Accuracy by family": draw_families(results),
    }
    if heat:
        pictures["Where tokens are kept: share of the answers that keep each patch"] = draw_heat(heat)
    for name, png in zip(("pareto", "families", "heat"), pictures.values(), strict=False):
        write(folder / f"{name}.png", png)
    plain = {"settings": settings, "rows": [result.as_dict() for result in results]}
    write(folder / "results.json", json.dumps(plain, indent=1).encode())
    page = folder / "report.html"
    write(page, make_page(settings, results, pictures).encode())
    return page
