"""The findings of FEATHER (arXiv 2412.13180), looked for in a trained model: accuracy, where tokens are kept, RoPE in the score.

    python -P studies/feather/study.py --model CKPT --questions FOLDER --out DIR
    python -P studies/feather/study.py --decoder smollm2 --out DIR

Methods are compared at equal FLOPs by `vlmprune.eval`; a killed run goes on from DIR. DIR gets rows.csv and two
pictures; --csv also brings a shared table up to date, and draws RoPE for all its models. README.md tells what came out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # studies/ only: a checkout must stay off the path

from common.asking import ask, exit_code
from common.options import name_of, options, save_rows
from common.rows import Row, find
from common.rows import load as load_rows
from rich.console import Console
from rich.table import Table

from feather.criteria import budget_arms, sweep_arms
from feather.measure import accuracy_rows, kept_rows, profiles
from feather.pictures import draw_profiles, draw_rope
from feather.rope import question_values, rope_rows
from vlmprune.eval import Checkpoint, Question, read_questions
from vlmprune.eval.ask import Subject, typical_prompt, with_template
from vlmprune.eval.oracle import check_oracle
from vlmprune.eval.page import percent
from vlmprune.eval.store import Store, check_out, write
from vlmprune.models import patch_grid

FAMILIES, BUDGETS = ("box", "cell"), (0.48, 0.64)
"""Localization; the FLOPs cuts of FEATHER's main table."""
NEW_TOKENS = 16  # a box in single digits and the spaces between them
console = Console()


def arguments() -> argparse.Namespace:
    """Command line."""
    parser = options(__doc__, "float32")
    add = parser.add_argument
    add("--model", help="checkpoint folder of a LLaVA with a Llama decoder")
    add("--questions", type=Path, help="folder with a questions.jsonl whose questions have a box")
    add("--decoder", choices=["smollm2"], help="instead: the score of a pretrained text decoder")
    add("--out", type=Path, required=True, help="folder for answers, rows.csv and pictures")
    add("--families", nargs="+", default=FAMILIES, help="of the questions")
    add("--sweep", nargs="*", type=int, default=[1, 2, 3, 4, 5, 6], help="layers of the sweep")
    add("--sweep-questions", type=int, default=200, help="of the first family, asked at every layer")
    add("--rope-questions", type=int, default=200, help="for the score with and without RoPE")
    add("--draws", type=int, default=2, help="of random tokens; of random words, per prompt")
    chosen = parser.parse_args()
    if (chosen.decoder is None) == (chosen.model is None or chosen.questions is None):
        parser.error("expected --model and --questions, or --decoder")
    return chosen


def main() -> int:
    """Measure, save, show. Exit code 2 for bad input, with one line that says what was expected."""
    return exit_code(partial(carry_out, arguments()))


def carry_out(chosen: argparse.Namespace) -> None:
    check_out(chosen.out)
    rows, dtype = study_decoder(chosen) if chosen.decoder else study_model(chosen)
    chosen.out.mkdir(exist_ok=True)
    save_rows(chosen, rows, dtype)
    write(chosen.out / "rope.png", draw_rope(load_rows(chosen.csv) if chosen.csv else rows))
    show(rows)


def study_decoder(chosen: argparse.Namespace) -> tuple[list[Row], str]:
    """RoPE in the score of SmolLM2."""
    from feather import smollm2

    values = smollm2.draw_values(*smollm2.load(), chosen.draws)
    return [*rope_rows(chosen.name or "SmolLM2-135M-Instruct", values, smollm2.GRID)], "float32"


def study_model(chosen: argparse.Namespace) -> tuple[list[Row], str]:
    """Every part of the study on one checkpoint."""
    name = name_of(chosen)
    checkpoint = Checkpoint(chosen.model, chosen.device, chosen.dtype)
    grid = patch_grid(checkpoint.config)
    questions = read_questions(chosen.questions, chosen.families)
    check_oracle(questions, checkpoint.config, checkpoint.processor)
    questions = with_template(checkpoint, questions)
    swept = [asked for asked in questions if asked.family == chosen.families[0]][: chosen.sweep_questions]
    prompt = typical_prompt(checkpoint, questions)
    arms, refused = budget_arms(prompt, BUDGETS, chosen.draws)
    sweep = sweep_arms(prompt, chosen.sweep)
    subject = Subject(checkpoint, chosen.batch_size, NEW_TOKENS)
    store = Store(chosen.out, subject.settings(chosen.questions))
    for line in refused:
        console.print(f"left out: {line}")
    for some, asked in ((arms, questions), (sweep, swept)):
        ask(subject, asked, some, store)
    bases = ("uniform", "fastv", "pyramiddrop")
    rows = [*accuracy_rows("budget", name, arms, questions, store.answers, bases)]
    for layer in chosen.sweep:
        here = [arm for arm in sweep if arm.policy is not None and arm.policy.layers == (layer,)]
        rows += accuracy_rows("sweep", name, here, swept, store.answers, ("uniform", "fastv"))
    rows += kept_rows(name, arms, questions, store.answers, grid)
    rows += _rope(chosen, name, checkpoint, questions, grid)
    kept = profiles(arms, questions, store.answers, grid, BUDGETS[-1])
    write(chosen.out / "heights.png", draw_profiles(kept))
    return rows, checkpoint.dtype


def _rope(
    chosen: argparse.Namespace, name: str, checkpoint: Checkpoint, questions: Sequence[Question], grid: Any
) -> list[Row]:
    boxed = [question for question in questions if question.box is not None][: chosen.rope_questions]
    values = question_values(checkpoint.model, checkpoint.processor, boxed, grid, chosen.batch_size)
    return [*rope_rows(name, values, grid)]


def show(rows: Sequence[Row]) -> None:
    """Print the means: right answers, then thirds, then RoPE layer by layer."""
    for part in dict.fromkeys(r.part for r in rows):
        some = find(rows, part=part)
        quantities = list(dict.fromkeys((r.family, r.quantity) for r in some if "minus" not in r.quantity))
        table = Table("method", "budget", "layer", *(" ".join(q).strip() for q in quantities), title=part)
        for key in dict.fromkeys((r.method, r.budget, r.layer) for r in some):
            cells = []
            for family, quantity in quantities:
                wanted = dict(zip(("method", "budget", "layer"), key, strict=True))
                found = find(some, family=family, quantity=quantity, **wanted)
                plain = quantity in ("cut", "tokens, mean over layers")
                cells.append(
                    "" if not found else f"{found[0].mean:.3f}" if plain else percent(found[0].estimate)
                )
            table.add_row(*("" if value is None else str(value) for value in key), *cells)
        console.print(table)


if __name__ == "__main__":
    sys.exit(main())
