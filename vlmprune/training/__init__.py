"""Training of what can be learned: the captioner and the selector of ACCM. ``train`` is all of it."""

from vlmprune.checkpoints import Checkpoint
from vlmprune.training.plan import Plan
from vlmprune.training.run import Trained, train
from vlmprune.training.start import Start

__all__ = ["Checkpoint", "Plan", "Start", "Trained", "train"]
