"""The batching service under load: batches grow with the rate, and waits stay within their bound.

Everything is compared with what the same machine did in the same second. Other processes come and
go, so a trial that fails is repeated once.
"""

import threading
import time
from collections.abc import Callable, Hashable, Iterator
from statistics import quantiles
from typing import Self

import graph_jobs
import pytest
import torch
from batch_load import BatchLoad
from rank_pool import RankPool

from runner.pipeline.batch_metrics import BatchSnapshot
from runner.pipeline.batching_policy import BatchingPolicy

LOAD_POLICY = BatchingPolicy(16, 8.0, 160)


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


def load(heavy: Heavy) -> BatchLoad:
    return BatchLoad(LOAD_POLICY, heavy, "a", heavy.item)


class Lateness:
    """How late this machine wakes a thread that sleeps, while something else runs."""

    def __init__(self) -> None:
        self._late_s: list[float] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.is_set():
            due = time.perf_counter() + 0.001
            time.sleep(0.001)
            self._late_s.append(time.perf_counter() - due)

    @property
    def p99_s(self) -> float:
        return quantiles(self._late_s, n=100)[-1]


def twice(trial: Callable[[], str | None]) -> None:
    problem = trial()
    if problem:
        print("again, because", problem)
        problem = trial()
    assert problem is None, problem


def batches_are_large(counts: BatchSnapshot, policy: BatchingPolicy) -> str | None:
    assert counts.completed == counts.submitted
    assert counts.by_reason["full"] == counts.by_size[policy.max_batch_size]
    is_large = counts.mean_batch_size > 0.6 * policy.max_batch_size
    return None if is_large else f"the mean batch is {counts.mean_batch_size:.1f}: {counts}"


def waits_are_short(
    counts: BatchSnapshot, policy: BatchingPolicy, lateness: Lateness
) -> str | None:
    """Within the delay and a batch, and what the machine was late to wake a thread meanwhile."""
    assert counts.completed == counts.submitted
    assert counts.by_reason["delay"] > 0, counts
    limit_s = policy.max_queue_delay_ms / 1000 + counts.batch_max_s + lateness.p99_s
    is_prompt = counts.rejected == 0 and counts.wait_p99_s <= limit_s
    return None if is_prompt else f"p99 {counts.wait_p99_s:.4f} s > {limit_s:.4f} s: {counts}"


def test_at_twice_the_capacity_batches_are_large() -> None:
    heavy = load(Heavy())
    twice(lambda: batches_are_large(heavy.send_at(2 * heavy.capacities()[-1], 1), LOAD_POLICY))


def test_at_half_the_capacity_nobody_waits_longer_than_the_delay_and_a_batch() -> None:
    heavy = load(Heavy())

    def trial() -> str | None:
        rate = 0.5 * heavy.capacities()[0]
        with Lateness() as lateness:
            counts = heavy.send_at(rate, 1)
        return waits_are_short(counts, LOAD_POLICY, lateness)

    twice(trial)


@pytest.mark.full
def test_a_pipeline_of_two_stages_under_load(rank_pool: RankPool) -> None:
    policy = graph_jobs.LOAD_POLICY

    def trial() -> str | None:
        with Lateness() as lateness:
            found = rank_pool.run(graph_jobs.under_load, [1, 1], 2.0)[0]
        return batches_are_large(found.twice, policy) or waits_are_short(
            found.half, policy, lateness
        )

    twice(trial)
