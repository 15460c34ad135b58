"""What the page is told of the last minutes."""

import pytest

from runner.engine.scheduler import Load
from runner.serve import history
from runner.serve.history import NUM_SLOTS, SLOT_S, History


def test_slots_hold_sums_and_highest_values_and_grow_old(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(history.time, "monotonic", lambda: now)
    kept = History()
    assert (kept.told()["load"], kept.told()["slots"]) == (None, [])
    kept.show(Load(3, 2, 0.5, 0, 10, 4))
    kept.show(Load(1, 0, 0.25, 0, 10, 4))
    kept.tokens([0.5], [0.1])
    kept.tokens([], [0.3])
    kept.finished(0.9)
    now += SLOT_S
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
    assert (told["load"]["num_running"], told["idle_s"]) == (1, SLOT_S)
    now += SLOT_S * NUM_SLOTS
    assert kept.told()["slots"] == []
