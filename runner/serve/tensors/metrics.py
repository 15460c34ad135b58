"""What Prometheus is told of a tensor model: its requests, and the batches of their samples."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector

from runner.pipeline.batch_metrics import WAIT_BOUNDS_S, BatchMetrics
from runner.serve.exposition import PREFIX, Exposition
from runner.serve.tensors.history import BatchHistory


class TensorMetrics(Exposition):
    """Of a server of a tensor model.

    Attributes:
        batches: what the batching service counts.
    """

    def __init__(self) -> None:
        super().__init__()
        self._history = BatchHistory()
        self.batches = self._history.batches
        self._end_to_end = self._seconds("e2e_request_latency", "From arrival to the outputs.")
        self._registry.register(_Batches(self.batches))

    def finished(self, reason: str, seconds: float | None = None) -> None:
        """A request has ended.

        Args:
            seconds: that it took, where it was answered.
        """
        self._finished.labels(finished_reason=reason).inc()
        if seconds is not None:
            self._end_to_end.observe(seconds)
            self._history.finished(seconds)
        elif reason != "cancelled":
            self._history.failed()

    def recent(self) -> dict[str, Any]:
        """See `runner.serve.status_api.Told`."""
        return self._history.told()


class _Batches(Collector):
    """The counters of batching, at the moment that they are asked for."""

    def __init__(self, metrics: BatchMetrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        now = self._metrics.snapshot()
        waits = zip(WAIT_BOUNDS_S, now.wait_counts, strict=False)
        yield GaugeMetricFamily(
            f"{PREFIX}_num_requests_running", "Samples in batches that run.", now.running
        )
        yield GaugeMetricFamily(
            f"{PREFIX}_num_requests_waiting", "Samples that wait for a batch.", now.queue_depth
        )
        yield HistogramMetricFamily(
            f"{PREFIX}_request_queue_time_seconds",
            "From a sample's arrival to the start of its batch.",
            buckets=_buckets(waits, now.wait_counts[-1]),
            sum_value=now.wait_s_sum,
        )
        counts = zip(now.by_size, accumulate(now.by_size.values()), strict=True)
        yield HistogramMetricFamily(
            f"{PREFIX}_batch_size",
            "Samples of a batch.",
            buckets=_buckets(counts, now.batches),
            sum_value=sum(size * count for size, count in now.by_size.items()),
        )
        yield SummaryMetricFamily(
            f"{PREFIX}_batch_seconds",
            "From the start of a batch to its results.",
            count_value=now.batches - now.batches_running,
            sum_value=now.batch_s_sum,
        )
        reasons = CounterMetricFamily(
            f"{PREFIX}_batches", "Batches by why they were cut.", labels=["reason"]
        )
        for reason, count in now.by_reason.items():
            reasons.add_metric([reason], count)
        yield reasons


def _buckets(counts: Iterable[tuple[float, int]], total: int) -> Sequence[tuple[str, float]]:
    """A histogram's, from how many values are at most as large as each bound."""
    return [(str(float(bound)), count) for bound, count in counts] + [("+Inf", total)]
