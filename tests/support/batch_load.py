"""A batching service under load: what it can do at most, and what happens at a given rate."""

import time
from collections.abc import Callable, Hashable
from concurrent.futures import wait
from typing import Any

from runner.pipeline.batch_metrics import BatchMetrics, BatchSnapshot
from runner.pipeline.batch_service import BatchService
from runner.pipeline.batcher import QueueFullError
from runner.pipeline.batching_policy import BatchingPolicy

_PATIENCE_S = 60.0

Execute = Callable[[Any, list[Any]], Any]


class BatchLoad:
    """Requests that are all alike, for services of one kind."""

    def __init__(
        self,
        policy: BatchingPolicy,
        execute: Execute,
        bucket: Hashable,
        item: object,
        *,
        max_in_flight: int = 1,
    ) -> None:
        self._policy = policy
        self._execute = execute
        self._bucket = bucket
        self._item = item
        self._max_in_flight = max_in_flight

    def capacities(self, rounds: int = 3) -> list[float]:
        """Requests a second that are answered when every batch is full; slowest round first."""
        num_requests = self._policy.max_queue_size
        rates = []
        for _ in range(rounds):
            with self._service(BatchMetrics()) as service:
                start = time.perf_counter()
                answers = [service.submit(self._bucket, self._item) for _ in range(num_requests)]
                wait(answers, _PATIENCE_S)
                rates.append(num_requests / (time.perf_counter() - start))
        return sorted(rates)

    def send_at(self, rate: float, seconds: float) -> BatchSnapshot:
        """Requests at even intervals, whether or not earlier ones are answered."""
        metrics = BatchMetrics()
        start = time.perf_counter()
        with self._service(metrics) as service:
            for number in range(int(rate * seconds)):
                ahead_s = start + number / rate - time.perf_counter()
                if ahead_s > 0:
                    time.sleep(ahead_s)
                try:
                    service.submit(self._bucket, self._item)
                except QueueFullError:
                    continue
        return metrics.snapshot()

    def _service(self, metrics: BatchMetrics) -> BatchService[Any, Any]:
        return BatchService(self._policy, self._execute, metrics, max_in_flight=self._max_in_flight)
