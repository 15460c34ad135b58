"""The batching service under load: batches grow with the rate, and waits stay within their bound.

Everything is compared with what the same machine did in the same second. Other processes come and
go, so a trial that fails is repeated once.
"""

import time
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import wait

import pytest
import torch

from runner.pipeline.batch_metrics import BatchMetrics, BatchSnapshot
from runner.pipeline.batch_service import BatchService
from runner.pipeline.batcher import QueueFullError
from runner.pipeline.batching_policy import BatchingPolicy

PATIENCE_S = 20.0
LOAD_POLICY = BatchingPolicy(16, 8.0, 160)
LOADED_S = 1.0
SLACK_S = 0.02
"""A busy machine of two cores may wake a thread this much too late."""


@pytest.fixture(autouse=True)
def one_torch_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Heavy:
    """A few milliseconds of real work a batch, in proportion to its size."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(2)
        self._weight = torch.randn(640, 640, generator=generator) / 640**0.5
        self.item = torch.randn(12, 640, generator=generator)

    @torch.inference_mode()
    def __call__(self, _bucket: Hashable, payloads: list[torch.Tensor]) -> list[torch.Tensor]:
        x = torch.stack(payloads)
        for _ in range(3):
            x = torch.tanh(x @ self._weight)
        return list(x)


def capacities(heavy: Heavy) -> list[float]:
    """Requests a second that the service answers when every batch is full; slowest round first."""
    num_requests = LOAD_POLICY.max_queue_size
    rates = []
    for _ in range(3):
        with BatchService(LOAD_POLICY, heavy, BatchMetrics()) as service:
            start = time.perf_counter()
            answers = [service.submit("a", heavy.item) for _ in range(num_requests)]
            wait(answers, PATIENCE_S)
            rates.append(num_requests / (time.perf_counter() - start))
    return sorted(rates)


def send_at(rate: float, heavy: Heavy) -> BatchSnapshot:
    """Requests at even intervals for `LOADED_S`, whether or not earlier ones are answered."""
    metrics = BatchMetrics()
    start = time.perf_counter()
    with BatchService(LOAD_POLICY, heavy, metrics) as service:
        for number in range(int(rate * LOADED_S)):
            ahead_s = start + number / rate - time.perf_counter()
            if ahead_s > 0:
                time.sleep(ahead_s)
            try:
                service.submit("a", heavy.item)
            except QueueFullError:
                continue
    return metrics.snapshot()


def twice(trial: Callable[[], str | None]) -> None:
    problem = trial()
    if problem:
        print("again, because", problem)
        problem = trial()
    assert problem is None, problem


def test_at_twice_the_capacity_batches_are_large() -> None:
    heavy = Heavy()

    def trial() -> str | None:
        counts = send_at(2 * capacities(heavy)[-1], heavy)
        assert counts.completed == counts.submitted
        assert counts.by_reason["full"] == counts.by_size[LOAD_POLICY.max_batch_size]
        is_large = counts.mean_batch_size > 0.6 * LOAD_POLICY.max_batch_size
        return None if is_large else f"the mean batch is {counts.mean_batch_size:.1f}: {counts}"

    twice(trial)


def test_at_half_the_capacity_nobody_waits_longer_than_the_delay_and_a_batch() -> None:
    heavy = Heavy()

    def trial() -> str | None:
        counts = send_at(0.5 * capacities(heavy)[0], heavy)
        assert counts.completed == counts.submitted
        assert counts.by_reason["delay"] > 0, counts
        limit_s = LOAD_POLICY.max_queue_delay_ms / 1000 + counts.batch_max_s + SLACK_S
        is_prompt = counts.rejected == 0 and counts.wait_p99_s <= limit_s
        return None if is_prompt else f"p99 {counts.wait_p99_s:.4f} s > {limit_s:.4f} s: {counts}"

    twice(trial)
