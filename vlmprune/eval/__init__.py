"""Accuracy of policies at equal cost: questions in, one scored answer at a time, then tables, plots and a page.

``run`` is all of it. What compares something else, as ``studies/`` do, takes the parts from the modules here.
"""

from vlmprune.checkpoints import Checkpoint
from vlmprune.eval.evaluation import BUDGETS, Evaluation, run
from vlmprune.eval.intervals import Estimate
from vlmprune.eval.questions import Question, read_questions
from vlmprune.eval.store import Answer
from vlmprune.eval.summary import Accuracy, Result

__all__ = [
    "BUDGETS",
    "Accuracy",
    "Answer",
    "Checkpoint",
    "Estimate",
    "Evaluation",
    "Question",
    "Result",
    "read_questions",
    "run",
]
