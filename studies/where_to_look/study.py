"""Where to look: Scout against the published choices of visual tokens at equal FLOPs, on any checkpoint and questions.

    python examples/glyphworld/make_questions.py --size 192 --seeds 73001:73043 --out q576
    python -P studies/where_to_look/study.py --model CKPT --questions q576 --out DIR --name world

A killed run goes on from DIR, which gets rows.csv. --csv also brings a shared table up to date; tables.py shows one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # studies/ only: a checkout must stay off the path

from common.asking import ask, exit_code, first
from common.options import name_of, options, save_rows
from common.rows import Row
from rich.console import Console
from rich.markdown import Markdown

from vlmprune.errors import InputError, ModelError
from vlmprune.eval import Checkpoint, Question, read_questions
from vlmprune.eval.arms import SMALLER, Arm
from vlmprune.eval.ask import Subject, typical_prompt, with_template
from vlmprune.eval.oracle import check_oracle
from vlmprune.eval.store import Store, check_out
from where_to_look.arms import study_arms
from where_to_look.measure import study_rows
from where_to_look.passes import TWO_PASSES, charged, two_passes
from where_to_look.scouts import scouts
from where_to_look.tables import right_table

BUDGETS = (0.52, 0.64, 0.83, 0.91, 0.94)
NEW_TOKENS = 16
console = Console()


def arguments() -> argparse.Namespace:
    """Command line."""
    parser = options(__doc__)
    add = parser.add_argument
    add("--model", required=True, help="checkpoint folder of a LLaVA")
    add("--questions", type=Path, required=True, help="folder with a questions.jsonl, some with a box")
    add("--out", type=Path, required=True, help="folder for answers and rows.csv")
    add("--budgets", nargs="+", type=float, default=BUDGETS, help="FLOPs cuts")
    add("--only", nargs="+", default=(), help="beginnings of the names of the methods to ask")
    add("--families", nargs="+", default=(), help="of the questions (default: all)")
    add("--limit", type=int, help="questions of each family (default: all)")
    add("--draws", type=int, default=2, help="of random tokens")
    return parser.parse_args()


def main() -> int:
    """Measure, save, show. Exit code 2 for bad input, with one line that says what was expected."""
    return exit_code(lambda: run(arguments()))


def run(chosen: argparse.Namespace) -> None:
    """The study, its rows on disk, and the first of its tables."""
    check_out(chosen.out)
    rows, dtype = study(chosen)
    save_rows(chosen, rows, dtype)
    console.print(Markdown(right_table(rows, rows[0].model)))


def study(chosen: argparse.Namespace) -> tuple[list[Row], str]:
    """Every method at every budget on one checkpoint."""
    name = name_of(chosen)
    checkpoint = Checkpoint(chosen.model, chosen.device, chosen.dtype)
    questions = first(read_questions(chosen.questions, chosen.families), chosen.limit)
    check_oracle(questions, checkpoint.config, checkpoint.processor)
    questions = with_template(checkpoint, questions)
    prompt = typical_prompt(checkpoint, questions)
    ours = scouts(prompt.shape.layers)
    tower = checkpoint.config.vision_config.num_hidden_layers
    arms, refused = study_arms(ours, chosen.budgets, prompt, tower, chosen.draws, chosen.only)
    subject = Subject(checkpoint, chosen.batch_size, NEW_TOKENS)
    arms, small = possible(subject, arms, questions)
    for line in (*refused, *small):
        console.print(f"left out: {line}")
    store = Store(chosen.out, subject.settings(chosen.questions) | {"limit": chosen.limit})
    ask(subject, questions, arms, store)
    again = []
    if not chosen.only or TWO_PASSES.startswith(tuple(chosen.only)):
        again = two_passes(subject, questions, arms, store.answers)
    ask(subject, questions, again, store)
    true = {answer.key: answer for answer in charged(subject, questions, prompt, again, store.answers)}
    rows = study_rows(name, [*arms, *again], questions, store.answers | true)
    return [*rows], checkpoint.dtype


def possible(
    subject: Subject, arms: Sequence[Arm], questions: Sequence[Question]
) -> tuple[list[Arm], list[str]]:
    """The arms without those whose pictures cannot be made so small, and why not."""
    fine, left_out = [], []
    for arm in arms:
        try:
            for size in {question.size for question in questions} if arm.smaller is not None else ():
                subject.pictures.plan(size, arm.smaller.keep)
            fine.append(arm)
        except (InputError, ModelError) as error:
            left_out.append(f"{SMALLER} at {arm.budget:.0%}: {error}")
    return fine, left_out


if __name__ == "__main__":
    sys.exit(main())
