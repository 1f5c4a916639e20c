"""95 % intervals: Wilson's for a share of yes and no, the bootstrap over questions for every other mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vlmprune.errors import check

Z = 1.959964
DRAWS, SEED = 10_000, 0


class Estimate(NamedTuple):
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float


def proportion(values: Sequence[float]) -> Estimate:
    """Mean of one value per question in [0, 1]: Wilson's interval if all are 0 or 1, else the bootstrap's.

    >>> [round(value, 3) for value in proportion([1.0] * 7 + [0.0] * 13)]
    [0.35, 0.181, 0.567]
    """
    if len(values) == 0 or not {*values} <= {0.0, 1.0}:
        return bootstrap(values)
    n = len(values)
    p, z = sum(values) / n, Z * Z / n
    middle, half = (p + z / 2) / (1 + z), (z * (p * (1 - p) + z / 4)) ** 0.5 / (1 + z)
    return Estimate(p, max(0.0, min(middle - half, p)), min(1.0, max(middle + half, p)))


def bootstrap(values: Sequence[float]) -> Estimate:
    """Mean of one value per question, and the percentiles of the means of questions drawn with replacement.

    Drawn as counts of the distinct values, which is the same and costs nothing: there are few.
    """
    check(len(values) > 0, "values", "at least one", "none")
    distinct, counts = np.unique(np.asarray(values, dtype=np.float64), return_counts=True)
    n = len(values)
    drawn = np.random.default_rng(SEED).multinomial(n, counts / n, size=DRAWS) @ distinct / n
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Estimate(float(counts @ distinct / n), float(low), float(high))
