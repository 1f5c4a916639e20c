"""Time of policies beside baselines: the unpruned model, a smaller image, the published style; with and without CUDA graphs.

``run`` is all of it; ``FullSize`` is a model of a published size with random weights.
"""

from vlmprune.bench.benchmark import Bench, run
from vlmprune.bench.profiles import Spent, by_range, read_profile
from vlmprune.bench.roofline import Peaks
from vlmprune.bench.rows import Row, Spread
from vlmprune.bench.shapes import SHAPES, FullSize
from vlmprune.checkpoints import Checkpoint

__all__ = [
    "SHAPES",
    "Bench",
    "Checkpoint",
    "FullSize",
    "Peaks",
    "Row",
    "Spent",
    "Spread",
    "by_range",
    "read_profile",
    "run",
]
