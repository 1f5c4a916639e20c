"""Training of what can be learned: ``train`` is all of it for ACCM's captioner and selector; scorers learn from ``context_of``."""

from vlmprune.checkpoints import Checkpoint
from vlmprune.training.contexts import context_of
from vlmprune.training.plan import Plan
from vlmprune.training.run import Trained, train
from vlmprune.training.start import Start

__all__ = ["Checkpoint", "Plan", "Start", "Trained", "context_of", "train"]
