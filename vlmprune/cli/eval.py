"""The ``eval`` command: checks everything, asks every question of every policy, writes tables, plots and a report."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from vlmprune import __version__
from vlmprune.cli.generate import build_text
from vlmprune.cli.load import (
    Loaded,
    check_attention,
    check_depth,
    load,
    load_processor,
    pick_device,
    quiet,
    read_config,
)
from vlmprune.cli.progress import waiting
from vlmprune.errors import InputError, ModelError, check
from vlmprune.eval.arms import Arm, plan
from vlmprune.eval.ask import Item, Subject, ask_all, make_batches, missing, typical_prompt
from vlmprune.eval.oracle import Oracle, check_oracle
from vlmprune.eval.plots import check_matplotlib, draw_families, draw_heat, draw_pareto
from vlmprune.eval.questions import FILE, read_questions
from vlmprune.eval.report import HEADS, NAMES, family_cells, make_report, summary_cells
from vlmprune.eval.store import Store, write
from vlmprune.eval.summary import Row, answers_of, kept_share, summarize
from vlmprune.models import patch_grid
from vlmprune.policies.random import Random
from vlmprune.policies.recipe import policy_from
from vlmprune.policies.uniform import Uniform

BUDGETS = (0.48, 0.64)
"""FLOPs cuts where none are given: those of FEATHER's tables."""


@dataclass(frozen=True)
class EvalRequest:
    """What was typed; see the options of ``vlmprune eval``."""

    model: str
    questions: Path
    out: Path
    policies: tuple[str, ...]
    budgets: str | None
    keep: bool
    families: tuple[str, ...]
    baselines: bool
    oracle: bool
    seeds: int
    batch_size: int
    max_new_tokens: int
    device: str
    dtype: str
    attention: str


def execute(request: EvalRequest) -> None:
    """Run the command. Raises one of ``vlmprune.errors`` for bad input, OSError where a file cannot be written."""
    quiet()
    check_matplotlib()
    budgets = read_budgets(request.budgets, request.keep)
    questions = read_questions(request.questions, request.families)
    policies = {text: policy_from(text) for text in request.policies}
    device = pick_device(request.device)
    check_attention(request.attention, device)
    check_out(request.out)
    config = read_config(request.model)
    check_depth([*policies.values()], config)
    processor = load_processor(request.model)
    if request.oracle:
        check_oracle(questions, config, processor)
    items = [(question, _prompt(processor, question.id, question.prompt)) for question in questions]
    batches = make_batches(processor, items, request.batch_size)
    prompt = typical_prompt(processor, config, items)
    baselines = (Uniform, Random) * request.baselines + (Oracle,) * request.oracle
    arms = plan(policies, budgets, baselines, request.seeds, prompt)
    check_depth([arm.policy for arm in arms if arm.policy is not None], config)
    with waiting(f"loading {request.model}"):
        loaded = load(request.model, config, processor, device, request.dtype, request.attention)
    settings = describe(request, loaded)
    store = Store(request.out, settings)
    speed = ask(Subject(loaded.model, processor, request.max_new_tokens), items, batches, arms, store)
    rows = summarize(questions, arms, store.answers)
    heat = _heat(config, arms, items, store)
    finish(request.out, settings | {"text_tokens": prompt.text, "visual_tokens": prompt.visual}, rows, heat)
    show(request, rows, speed)


def read_budgets(text: str | None, keep: bool) -> tuple[float, ...]:
    """FLOPs cuts from ``0.48,0.64``; none with ``--keep``. Raises InputError for anything else."""
    check(text is None or not keep, "--budgets", "either --budgets or --keep", "both")
    if keep or text is None:
        return () if keep else BUDGETS
    try:
        cuts = tuple(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError as error:
        raise InputError(f"--budgets: expected numbers separated by commas, got {text!r}") from error
    check(all(0 < cut < 1 for cut in cuts), "--budgets", "FLOPs cuts between 0 and 1", text)
    return cuts


def check_out(folder: Path) -> None:
    """Raise InputError unless results can be written there; asked before anything slow."""
    check(not folder.exists() or folder.is_dir(), "--out", "a folder, or a new name", repr(str(folder)))
    check(folder.parent.is_dir(), "--out", "a folder inside an existing one", repr(str(folder)))


def describe(request: EvalRequest, loaded: Loaded) -> dict[str, Any]:
    """All that answers depend on besides policy, question and seed. A folder of results belongs to one such set.

    Images are told by their names, which stand among the questions.
    """
    template = str(loaded.processor.chat_template)
    return {
        "version": __version__,
        "model": request.model,
        "weights": fingerprint(loaded.model),
        "questions": hashlib.sha256((request.questions / FILE).read_bytes()).hexdigest()[:16],
        "template": hashlib.sha256(template.encode()).hexdigest()[:16],
        "device": loaded.device,
        "dtype": loaded.dtype,
        "attention": loaded.attention,
        "batch_size": request.batch_size,
        "max_new_tokens": request.max_new_tokens,
    }


def fingerprint(model: Any) -> str:
    """Differs between checkpoints that were trained differently: a hash of some values of every weight."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        some = weight.detach().flatten()[:64].float().cpu()
        digest.update(name.encode() + some.numpy().tobytes())
    return digest.hexdigest()[:16]


def ask(
    subject: Subject, items: Sequence[Item], batches: Sequence[list[Item]], arms: Sequence[Arm], store: Store
) -> float | None:
    """Fill the store under a progress bar; answers per second, or None if there was nothing left to ask."""
    total = missing(items, arms, store)
    start = time.perf_counter()
    with _bar(total) as advance:
        for _ in ask_all(subject, batches, arms, store):
            advance()
    return total / (time.perf_counter() - start) if total else None


def finish(folder: Path, settings: dict[str, Any], rows: list[Row], heat: dict[str, Any]) -> None:
    """Write results.json, the pictures and the report."""
    pictures = {
        "pareto": ("Accuracy against cost", draw_pareto(rows)),
        "families": ("Accuracy by family", draw_families(rows)),
    }
    if heat:
        pictures["heat"] = (
            "Where tokens are kept: share of the answers that keep each patch",
            draw_heat(heat),
        )
    for name, (_, png) in pictures.items():
        write(folder / f"{name}.png", png)
    results = {"settings": settings, "rows": [row.as_dict() for row in rows]}
    write(folder / "results.json", json.dumps(results, indent=1).encode())
    write(folder / "report.html", make_report(settings, rows, dict(pictures.values())).encode())


def show(request: EvalRequest, rows: list[Row], speed: float | None) -> None:
    """Print the table, the families below it, and where everything is."""
    console = Console()
    console.print(_table(HEADS, [summary_cells(row) for row in rows]))
    heads = (*NAMES, *rows[0].families)
    console.print(_table(heads, [family_cells(row) for row in rows]))
    rate = "nothing left to ask" if speed is None else f"{speed:.1f} answers/s, everything included"
    note = f"{rows[0].all.questions} questions, batches of {request.batch_size}; {rate}."
    console.print(Text(f"{note}\nreport: {request.out / 'report.html'}", style="dim"))


def _prompt(processor: Any, question: str, text: str) -> str:
    try:
        return build_text(processor, text, 1)
    except InputError as error:
        raise InputError(f"question {question!r}: {error}") from error


def _heat(config: Any, arms: Sequence[Arm], items: Sequence[Item], store: Store) -> dict[str, Any]:
    """Title -> where the method keeps tokens; empty for models whose images do not share one grid."""
    try:
        grid = patch_grid(config)
    except ModelError:
        return {}
    groups: dict[str, list[Arm]] = {}
    for arm in arms:
        if arm.policy is not None:
            budget = "" if arm.budget is None else f" at {arm.budget:.1%}"
            groups.setdefault(f"{arm.method}{budget}", []).append(arm)
    questions = [question for question, _ in items]
    return {
        title: kept_share(answers_of(some, questions, store.answers), grid) for title, some in groups.items()
    }


def _table(heads: Sequence[str], cells: Sequence[Sequence[str]]) -> Table:
    """A table whose first column is the method, one setting a line."""
    out = Table(*heads, show_lines=True)
    for method, *rest in cells:
        out.add_row(*map(Text, (method.replace(":", "\n").replace(",", "\n"), *rest)))
    return out


@contextmanager
def _bar(total: int) -> Iterator[Any]:
    """Yield what moves the bar by one answer; it shows on stderr, and only on a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("answers"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("answers", total=total)
        yield lambda: bar.advance(task)
