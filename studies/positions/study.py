"""What it costs to pack the kept tokens' positions to 0, 1, 2, ..., as most methods were released, for methods that can do both.

    python -P studies/positions/study.py --model CKPT --questions FOLDER --out DIR --csv studies/positions/glyphworld.csv
    python -P studies/positions/study.py --tables studies/positions/glyphworld.csv

Both arms of a pair have the same budget and settings, and are compared question by question. A killed run goes on from DIR,
also with other methods. DIR gets rows.csv; --csv also brings a shared table up to date. README.md tells what came out.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # studies/ only: a checkout must stay off the path

from common.asking import ask, exit_code, first
from common.options import name_of, options, save_rows
from common.rows import Row, load
from rich.console import Console

from positions.arms import make_arms, methods
from positions.tables import make_rows, tables
from vlmprune.eval import Checkpoint, read_questions
from vlmprune.eval.ask import Subject, typical_prompt, with_template
from vlmprune.eval.store import Store, check_out

BUDGETS = (0.64, 0.83, 0.91, 0.94)
NEW_TOKENS = 16
console = Console()


def arguments() -> argparse.Namespace:
    """Command line."""
    parser = options(__doc__)
    add = parser.add_argument
    add("--model", help="checkpoint folder")
    add("--questions", type=Path, help="folder with a questions.jsonl")
    add("--out", type=Path, help="folder for answers and rows.csv")
    add("--tables", type=Path, help="instead: print the tables of the README from these rows")
    add("--methods", nargs="+", help="as typed, with their layers (default: all, scaled to the decoder)")
    add("--budgets", nargs="+", type=float, default=BUDGETS, help="FLOPs cuts")
    add("--limit", type=int, help="questions of each family (default: all)")
    chosen = parser.parse_args()
    measuring = [chosen.model, chosen.questions, chosen.out]
    if None in measuring and (chosen.tables is None or any(measuring)):
        parser.error("expected --model, --questions and --out, or --tables")
    return chosen


def main() -> int:
    """Measure, save, show. Exit code 2 for bad input, with one line that says what was expected."""
    return exit_code(partial(carry_out, arguments()))


def carry_out(chosen: argparse.Namespace) -> None:
    if chosen.tables is not None:
        print(tables(load(chosen.tables)))
        return
    check_out(chosen.out)
    rows, dtype = study(chosen)
    save_rows(chosen, rows, dtype)
    print(tables(rows))


def study(chosen: argparse.Namespace) -> tuple[list[Row], str]:
    """Every pair of arms on one checkpoint."""
    checkpoint = Checkpoint(chosen.model, chosen.device, chosen.dtype)
    questions = first(read_questions(chosen.questions), chosen.limit)
    questions = with_template(checkpoint, questions)
    prompt = typical_prompt(checkpoint, questions)
    texts, no_room = chosen.methods, []
    if texts is None:
        texts, no_room = methods(prompt.shape.layers, checkpoint.config.vision_config.num_hidden_layers)
    arms, refused = make_arms(texts, chosen.budgets, prompt)
    for line in (*no_room, *refused):
        console.print(f"left out: {line}")
    subject = Subject(checkpoint, chosen.batch_size, NEW_TOKENS)
    store = Store(chosen.out, subject.settings(chosen.questions) | {"limit": chosen.limit})
    ask(subject, questions, arms, store)
    name = name_of(chosen)
    return [*make_rows(name, arms, questions, store.answers)], checkpoint.dtype


if __name__ == "__main__":
    sys.exit(main())
