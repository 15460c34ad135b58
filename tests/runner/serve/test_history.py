"""What the page is told of the last minutes."""

import pytest

from runner.engine.scheduler import Load
from runner.pipeline.bucket_queue import CutReason
from runner.serve import history
from runner.serve.history import NUM_SLOTS, SLOT_S, TokenHistory
from runner.serve.tensors.history import BatchHistory


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(history, "time", clock)
    return clock


def test_slots_hold_sums_and_highest_values_and_grow_old(clock: Clock) -> None:
    kept = TokenHistory()
    assert (kept.told()["load"], kept.told()["slots"]) == (None, [])
    kept.show(Load(3, 2, 0.5, 0, 10, 4))
    kept.show(Load(1, 0, 0.25, 0, 10, 4))
    kept.tokens([0.5], [0.1])
    kept.tokens([], [0.3])
    kept.finished(0.9)
    clock.now += SLOT_S
    kept.failed()
    told = kept.told()
    older, newer = told["slots"]
    assert (older["slots_ago"], newer["slots_ago"]) == (1, 0)
    assert (older["tokens"], older["running"], older["waiting"], older["cache_usage"]) == (
        3,
        3,
        2,
        0.5,
    )
    assert older["inter_token"] == {"count": 2, "total_s": pytest.approx(0.4), "max_s": 0.3}
    assert older["first_token"]["count"] == older["end_to_end"]["count"] == 1
    assert (older["failed"], newer["failed"]) == (0, 1)
    assert told["load"]["num_running"] == 1
    clock.now += SLOT_S * NUM_SLOTS
    assert kept.told()["slots"] == []


def test_batches_are_told_by_what_batching_counts(clock: Clock) -> None:
    kept = BatchHistory()
    batches = kept.batches
    for _ in range(5):
        batches.count("submitted")
    assert kept.told()["load"] == {"num_running": 0, "num_waiting": 5}
    batches.batch_started(CutReason.FULL, [0.25, 0.75, 0.5])
    assert kept.told()["load"] == {"num_running": 3, "num_waiting": 2}
    clock.now += SLOT_S
    batches.batch_finished(3, 2.0, has_failed=False)
    assert kept.told()["load"] == {"num_running": 0, "num_waiting": 2}
    started, ended = kept.told()["slots"]
    assert (started["batches"], started["samples"]) == (1, 3)
    assert (started["running"], started["waiting"]) == (3, 5)
    assert (ended["running"], ended["waiting"]) == (0, 2)
    assert started["wait"] == {"count": 3, "total_s": 1.5, "max_s": 0.75}
    assert started["batch"]["count"] == 0
    assert (ended["batches"], ended["batch"]["max_s"]) == (0, 2.0)
