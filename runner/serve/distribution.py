"""`Distribution`: a Prometheus histogram that one thread writes, for what happens to every token.

The client library locks and searches for each value, which at 64 sequences is a good part of what
the host does in a step.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate

from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector


class Distribution(Collector):
    """Counts values up to each of some bounds; any thread may read it."""

    def __init__(self, name: str, says: str, bounds: Sequence[float]) -> None:
        """
        Args:
            bounds: ascending; a value belongs to the first that it does not exceed.
        """
        self._name = name
        self._says = says
        self._bounds = [float(bound) for bound in bounds]
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def describe(self) -> list[HistogramMetricFamily]:
        """By its name; so that no two have one."""
        return [HistogramMetricFamily(self._name, self._says)]

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """Up to now."""
        names = [*map(str, self._bounds), "+Inf"]
        buckets = list(zip(names, accumulate(self._counts), strict=True))
        yield HistogramMetricFamily(self._name, self._says, buckets=buckets, sum_value=self._sum)
