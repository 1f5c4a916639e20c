"""Accuracy of policies at equal cost: questions in, one scored answer at a time, then tables, plots and a page.

``run`` is all of it. A study that compares something else takes the parts: ``with_template``, ``make_arms`` or ``fit_arm``,
``Subject`` and ``Store`` for ``ask_all``, then ``summarize``, or ``per_question`` and the intervals.
"""

from vlmprune.checkpoints import Checkpoint
from vlmprune.eval.arms import UNPRUNED, Arm, TypicalPrompt, cut_of, fit_arm, groups_of, make_arms
from vlmprune.eval.ask import (
    Subject,
    ask_all,
    make_batches,
    make_inputs,
    missing,
    typical_prompt,
    with_template,
)
from vlmprune.eval.evaluation import BUDGETS, Evaluation, run
from vlmprune.eval.intervals import Estimate, bootstrap, proportion
from vlmprune.eval.oracle import Oracle, check_oracle, patches_in
from vlmprune.eval.page import percent
from vlmprune.eval.questions import Question, read_questions
from vlmprune.eval.scoring import iou, judge, read_box
from vlmprune.eval.store import Answer, Key, Store, check_out, write
from vlmprune.eval.summary import (
    Accuracy,
    Result,
    answers_of,
    kept_marks,
    kept_share,
    per_question,
    summarize,
)

__all__ = [
    "BUDGETS",
    "UNPRUNED",
    "Accuracy",
    "Answer",
    "Arm",
    "Checkpoint",
    "Estimate",
    "Evaluation",
    "Key",
    "Oracle",
    "Question",
    "Result",
    "Store",
    "Subject",
    "TypicalPrompt",
    "answers_of",
    "ask_all",
    "bootstrap",
    "check_oracle",
    "check_out",
    "cut_of",
    "fit_arm",
    "groups_of",
    "iou",
    "judge",
    "kept_marks",
    "kept_share",
    "make_arms",
    "make_batches",
    "make_inputs",
    "missing",
    "patches_in",
    "per_question",
    "percent",
    "proportion",
    "read_box",
    "read_questions",
    "run",
    "summarize",
    "typical_prompt",
    "with_template",
    "write",
]
