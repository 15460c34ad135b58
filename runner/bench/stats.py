"""Medians, percentiles, and when a measurement may end."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

WINDOW = 3
"""Rounds that must agree, and that are reported."""

TOLERANCE = 0.02
"""How far apart they may lie, as a share of their median."""


@dataclass(frozen=True)
class Summary:
    """A set of measurements; percentiles are interpolated linearly, as numpy's default is."""

    count: int
    min: float
    mean: float
    median: float
    p90: float
    p95: float
    p99: float
    max: float


def summarize(values: Sequence[float]) -> Summary:
    """At least one value."""
    low, median, p90, p95, p99, high = np.percentile(values, (0, 50, 90, 95, 99, 100)).tolist()
    return Summary(len(values), low, float(np.mean(values)), median, p90, p95, p99, high)


def is_stable(values: Sequence[float]) -> bool:
    """Whether the last `WINDOW` values lie within `TOLERANCE` of one another.

    >>> is_stable([9.0, 1.00, 1.01, 1.02]), is_stable([1.00, 1.01, 1.03]), is_stable([1.0, 1.0])
    (True, False, False)
    """
    last = values[-WINDOW:]
    if len(last) < WINDOW:
        return False
    return bool(max(last) - min(last) <= TOLERANCE * float(np.median(last)))
