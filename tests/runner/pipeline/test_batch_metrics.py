"""The counters of dynamic batching, told a short history."""

import pytest

from runner.pipeline.batch_metrics import WAIT_BOUNDS_S, BatchMetrics
from runner.pipeline.bucket_queue import CutReason


def test_a_snapshot_before_anything_happened_is_all_zeros() -> None:
    counts = BatchMetrics().snapshot()
    assert (counts.submitted, counts.batches, counts.mean_batch_size) == (0, 0, 0.0)
    assert (counts.wait_p50_s, counts.wait_p99_s, counts.batch_max_s) == (0.0, 0.0, 0.0)
    assert counts.by_reason == {}
    assert counts.by_size == {}


def test_a_short_history() -> None:
    metrics = BatchMetrics()
    for _ in range(9):
        metrics.count("submitted")
    metrics.count("rejected")
    metrics.count("expired")
    metrics.count("cancelled")
    metrics.batch_started(CutReason.FULL, [0.004, 0.001, 0.0])
    metrics.batch_started(CutReason.DELAY, [0.02])
    metrics.batch_started(CutReason.DELAY, [99.0])
    metrics.batch_finished(3, 0.25, has_failed=False)
    metrics.batch_finished(1, 0.5, has_failed=True)
    counts = metrics.snapshot()
    assert (counts.submitted, counts.rejected, counts.expired, counts.cancelled) == (9, 1, 1, 1)
    assert (counts.completed, counts.failed, counts.running, counts.queue_depth) == (3, 1, 1, 2)
    assert counts.by_reason == {"full": 1, "delay": 2}
    assert counts.by_size == {1: 2, 3: 1}
    assert counts.mean_batch_size == pytest.approx(5 / 3)
    assert counts.wait_s_sum == pytest.approx(99.025)
    assert (counts.wait_p50_s, counts.wait_p99_s) == (0.004, 99.0)
    assert (counts.batch_p50_s, counts.batch_max_s) == (0.25, 0.5)


def test_the_histogram_is_cumulative_and_bounds_are_included() -> None:
    metrics = BatchMetrics()
    metrics.batch_started(CutReason.FULL, [0.0, 0.001, 0.0011, 0.02, 99.0])
    counts = dict(zip(WAIT_BOUNDS_S, metrics.snapshot().wait_counts, strict=False))
    assert (counts[0.001], counts[0.002], counts[0.01], counts[0.02], counts[30.0]) == (
        2,
        3,
        3,
        4,
        4,
    )
    assert metrics.snapshot().wait_counts[-1] == 5
