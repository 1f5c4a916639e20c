"""Words for what pruning loses, against what needs no words, on held-out questions of glyphworld.

    python examples/glyphworld/make_questions.py --seeds 70201:70301 --out q112
    python -P studies/accm/study.py --model CKPT --questions q112 --compensators DIR DIR DIR --keep 20 12 6 --out DIR

A killed run goes on from DIR. DIR gets rows.csv; --csv also brings a shared table up to date. README.md tells what came out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # studies/ only: a checkout must stay off the path
sys.path.insert(0, str(Path(__file__).parents[2] / "examples/glyphworld"))

from common.asking import ask, exit_code
from common.options import name_of, options, save_rows
from common.rows import Row, row
from make_questions import STREAM
from rich.console import Console
from rich.table import Table
from world.notes import about
from world.questions import ask_all as questions_about
from world.scenes import make_scene

from accm.arms import Told, make_arms, spend
from accm.rectify import answer_rectified
from vlmprune import policy_from
from vlmprune.eval import Answer, Checkpoint, Question, read_questions
from vlmprune.eval.arms import cost
from vlmprune.eval.ask import (
    Subject,
    batch_inputs,
    make_batches,
    missing,
    typical_prompt,
    with_template,
)
from vlmprune.eval.intervals import bootstrap
from vlmprune.eval.page import percent
from vlmprune.eval.scoring import judge
from vlmprune.eval.store import Store, check_out

NEW_TOKENS = 16
console = Console()


def arguments() -> argparse.Namespace:
    """Command line."""
    parser = options(__doc__)
    add = parser.add_argument
    add("--model", required=True, help="checkpoint of glyphworld that reads")
    add("--questions", type=Path, required=True, help="folder of make_questions.py")
    add("--compensators", type=Path, nargs="+", default=[], help="folders of compensators, one a seed")
    add("--selection", nargs="+", default=["uniform:layer=0"], help="what chooses the tokens that stay")
    add("--keep", type=int, nargs="+", required=True, help="visual tokens that stay")
    add("--out", type=Path, required=True, help="folder for answers and rows.csv")
    return parser.parse_args()


def main() -> int:
    """Measure, save, show. Exit code 2 for bad input, with one line that says what was expected."""
    return exit_code(partial(carry_out, arguments()))


def carry_out(chosen: argparse.Namespace) -> None:
    check_out(chosen.out)
    rows, dtype = study(chosen)
    save_rows(chosen, rows, dtype)
    show(rows)


def study(chosen: argparse.Namespace) -> tuple[list[Row], str]:
    """Every arm of every selection at every budget, then what costs as much without words."""
    checkpoint = Checkpoint(chosen.model, chosen.device, chosen.dtype)
    side = checkpoint.config.vision_config.image_size
    questions = with_template(checkpoint, read_questions(chosen.questions))
    subject = Subject(checkpoint, chosen.batch_size, NEW_TOKENS)
    store = Store(chosen.out, subject.settings(chosen.questions))
    batches = make_batches(checkpoint.processor, questions, chosen.batch_size)
    notes = tuple(tuple(note_of(question, side) for question in batch) for batch in batches)
    prompt = typical_prompt(checkpoint, questions)
    cut_at = {k: cost(prompt, [(0, k)])[0] for k in range(1, prompt.visual + 1)}
    name, rows = name_of(chosen), []
    whole = Told("unpruned", name="unpruned")
    ask(subject, questions, [whole], store)
    rows += table(name, "", [whole], questions, store)
    for text in chosen.selection:
        for keep in chosen.keep:
            arms = make_arms(policy_from(text), keep, chosen.compensators, notes)
            ask(subject, questions, arms, store)
            rectified = Told("rectified logits", keep, arms[0].policy, name=f"{arms[0].name}, rectified")
            rectify(subject, batches, rectified, store)
            arms.append(rectified)
            wordy = [arm for arm in arms if arm.method == "likeliest caption"]
            if wordy:
                spent = np.mean([a.cut for arm in wordy for a in answers_of(arm, questions, store)])
                arms.append(spend(keep, float(spent), cut_at))
                ask(subject, questions, arms[-1:], store)
            rows += table(name, text, arms, questions, store)
    return rows, checkpoint.dtype


def note_of(question: Question, side: int) -> str:
    """A true note that holds the answer to a question of make_questions.py, in the first wording."""
    seed, number, _ = question.id.split("-")
    scene = make_scene(int(seed), side)
    asked = [*questions_about(scene, np.random.default_rng((int(seed), STREAM)))][int(number)]
    assert " ".join(asked.words) in question.prompt, question
    return " ".join(about(scene, asked))


def rectify(subject: Subject, batches: Sequence[Sequence[Question]], arm: Told, store: Store) -> None:
    """The answers with rectified logits, about the tokens that plain pruning keeps and at its cost."""
    checkpoint, plain = subject.checkpoint, arm.name.removesuffix(", rectified")
    tokenizer = checkpoint.processor.tokenizer
    for batch in batches:
        if not missing(batch, [arm], store):
            continue
        inputs = batch_inputs(checkpoint.processor, batch).to(
            checkpoint.model.device, dtype=checkpoint.model.dtype
        )
        given = [store.answers[plain, question.id, 0] for question in batch]
        kept = [places(answer) for answer in given]
        new = answer_rectified(checkpoint.model, inputs, kept, tokenizer.eos_token_id, subject.max_new_tokens)
        for question, answer, ids in zip(batch, given, new, strict=True):
            said = tokenizer.decode(ids, skip_special_tokens=True).strip()
            right, exact = judge(said, question.answer)
            told = dict(policy=arm.key, answer=said, right=right, exact=exact)
            if (arm.key, question.id, 0) not in store.answers:
                store.add(Answer(**{**vars(answer), **told}))


def places(answer: Answer) -> list[int]:
    """The tokens that stayed at the last stage, ascending."""
    bits = int(answer.kept[-1][1], 16)
    return [i for i in range(bits.bit_length()) if bits >> i & 1]


def answers_of(arm: Told, questions: Sequence[Question], store: Store) -> list[Answer]:
    """An arm's answers in the order of the questions."""
    return [store.answers[arm.key, question.id, arm.seed] for question in questions]


def table(
    name: str, selection: str, arms: Sequence[Told], questions: Sequence[Question], store: Store
) -> list[Row]:
    """Right answers of each method in percent by family and over all, seeds averaged question by question; against no words."""
    rows, base = [], None
    for method in dict.fromkeys(arm.method for arm in arms):
        seeds = [answers_of(arm, questions, store) for arm in arms if arm.method == method]
        right = np.mean([[a.right for a in answers] for answers in seeds], axis=0)
        base = right if base is None else base
        cut = float(np.mean([[a.cut for a in answers] for answers in seeds]))
        keep = next(arm.budget for arm in arms if arm.method == method)
        shared = dict(
            model=name, part=selection, method=method, budget=keep, note=f"{len(seeds)} seeds, cut {cut:.4f}"
        )
        for family in ("", *dict.fromkeys(question.family for question in questions)):
            here = [i for i, question in enumerate(questions) if family in ("", question.family)]
            rows.append(row(bootstrap(right[here]), len(here), quantity="right", family=family, **shared))
            if right is not base:
                gain = bootstrap((right - base)[here])
                rows.append(row(gain, len(here), quantity="right minus no words", family=family, **shared))
    return rows


def show(rows: Sequence[Row]) -> None:
    """Print right answers over all families and their difference from no words."""
    out = Table("selection", "keep", "method", "right", "minus no words", "note")
    for r in rows:
        if r.quantity == "right" and not r.family:
            key = ("part", "budget", "method", "family")
            gains = [
                g for g in rows if "minus" in g.quantity and all(getattr(g, k) == getattr(r, k) for k in key)
            ]
            gain = percent(gains[0].estimate) if gains else ""
            out.add_row(r.part, str(r.budget), r.method, percent(r.estimate), gain, r.note)
    console.print(out)


if __name__ == "__main__":
    sys.exit(main())
