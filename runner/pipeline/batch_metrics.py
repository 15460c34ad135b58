"""What dynamic batching counts: why batches were cut, how large they are, how long requests wait.

Counters only; a registry of any kind is the exporter's.
"""

from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from threading import Lock
from typing import Literal

from runner.pipeline.bucket_queue import CutReason

WAIT_BOUNDS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Upper bounds, each included, of the histogram of waits; beyond the last is one more bucket."""

Event = Literal["submitted", "rejected", "expired", "cancelled", "abandoned"]

_LEFT = ("completed", "failed", "expired", "cancelled", "abandoned")
"""How a request that was accepted can end."""

_RECENT = 4096
"""Requests, and batches, that the percentiles look back on."""


@dataclass(frozen=True)
class BatchSnapshot:
    """The counters at one moment; all count from the start but where "recent" is said.

    Every request that was accepted is in exactly one of `completed`, `failed`, `expired`,
    `cancelled`, `abandoned`, `queue_depth` (waits) and `running`.

    Attributes:
        submitted: requests accepted.
        rejected: requests refused because the queue was full.
        abandoned: requests that were waiting when the service was closed without them.
        queue_depth: requests that wait now.
        running: requests in the batches that run now.
        batches: batches that ran, failed ones included.
        by_reason: batches by the value of their `CutReason`.
        by_size: batches by their number of requests.
        mean_batch_size: 0 while there was no batch.
        wait_s_sum: seconds from arrival to the start of the batch, over all requests that ran.
        wait_counts: requests that waited at most as long as each of `WAIT_BOUNDS_S`, then all.
        wait_p50_s: of recent requests; 0 while there is none.
        wait_p99_s: likewise.
        batches_running: those that run now.
        batch_s_sum: seconds from the start of a batch to its results, over all that have ended.
        batch_p50_s: seconds from the start of a recent batch to its results.
        batch_max_s: the longest of the recent ones.
    """

    submitted: int
    rejected: int
    completed: int
    failed: int
    expired: int
    cancelled: int
    abandoned: int
    queue_depth: int
    running: int
    batches: int
    by_reason: dict[str, int]
    by_size: dict[int, int]
    mean_batch_size: float
    wait_s_sum: float
    wait_counts: tuple[int, ...]
    wait_p50_s: float
    wait_p99_s: float
    batches_running: int
    batch_s_sum: float
    batch_p50_s: float
    batch_max_s: float


class BatchMetrics:
    """Written by the service's threads, read by any."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._requests: Counter[str] = Counter()
        self._running = 0
        self._reasons: Counter[str] = Counter()
        self._sizes: Counter[int] = Counter()
        self._wait_s_sum = 0.0
        self._num_batches_running = 0
        self._batch_s_sum = 0.0
        self._wait_counts = [0] * (len(WAIT_BOUNDS_S) + 1)
        self._recent_waits: deque[float] = deque(maxlen=_RECENT)
        self._recent_batches: deque[float] = deque(maxlen=_RECENT)

    def count(self, event: Event) -> None:
        """One request was accepted, or left without having run."""
        with self._lock:
            self._requests[event] += 1

    def batch_started(self, reason: CutReason, waits_s: Sequence[float]) -> None:
        """Args: waits_s: how long each of its requests was in the queue."""
        with self._lock:
            self._reasons[reason.value] += 1
            self._sizes[len(waits_s)] += 1
            self._running += len(waits_s)
            self._num_batches_running += 1
            self._wait_s_sum += sum(waits_s)
            self._recent_waits.extend(waits_s)
            for wait_s in waits_s:
                self._wait_counts[bisect_left(WAIT_BOUNDS_S, wait_s)] += 1

    def batch_finished(self, num_requests: int, seconds: float, *, has_failed: bool) -> None:
        """Args: seconds: since it was started."""
        with self._lock:
            self._running -= num_requests
            self._num_batches_running -= 1
            self._batch_s_sum += seconds
            self._requests["failed" if has_failed else "completed"] += num_requests
            self._recent_batches.append(seconds)

    @property
    def running(self) -> int:
        """Requests in the batches that run now."""
        return self._running

    @property
    def queue_depth(self) -> int:
        """Requests that wait now."""
        with self._lock:
            return self._depth()

    def _depth(self) -> int:
        num_left = sum(self._requests[event] for event in _LEFT)
        return self._requests["submitted"] - num_left - self._running

    def snapshot(self) -> BatchSnapshot:
        with self._lock:
            requests = self._requests.copy()
            num_batches = self._sizes.total()
            num_run = sum(size * count for size, count in self._sizes.items())
            waits, batches = sorted(self._recent_waits), sorted(self._recent_batches)
            return BatchSnapshot(
                **{event: requests[event] for event in ("submitted", "rejected", *_LEFT)},
                queue_depth=self._depth(),
                running=self._running,
                batches=num_batches,
                by_reason=dict(self._reasons),
                by_size=dict(sorted(self._sizes.items())),
                mean_batch_size=num_run / num_batches if num_batches else 0.0,
                wait_s_sum=self._wait_s_sum,
                wait_counts=tuple(accumulate(self._wait_counts)),
                wait_p50_s=_percentile(waits, 50),
                wait_p99_s=_percentile(waits, 99),
                batches_running=self._num_batches_running,
                batch_s_sum=self._batch_s_sum,
                batch_p50_s=_percentile(batches, 50),
                batch_max_s=_percentile(batches, 100),
            )


def _percentile(ascending: Sequence[float], percent: int) -> float:
    """The smallest value that `percent` of the values do not exceed (nearest rank).

    >>> _percentile([1.0, 2.0, 3.0, 4.0], 50), _percentile([1.0, 2.0], 99), _percentile([], 50)
    (2.0, 2.0, 0.0)
    """
    return ascending[-(-percent * len(ascending) // 100) - 1] if ascending else 0.0
