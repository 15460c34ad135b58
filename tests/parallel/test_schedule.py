"""The micro-batch schedule: its bubble and makespan are those of the schedule played by hand."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.errors import ConfigError
from parallel.schedule import Prediction, predict

TIMES = st.lists(st.integers(1, 9).map(float), min_size=1, max_size=6)


def by_recurrence(
    stage_times: list[float], transfer_times: list[float], num_microbatches: int
) -> float:
    """The makespan, from when each micro-batch ends on each stage, written down as a recurrence."""
    num_stages = len(stage_times)

    def end(microbatch: int, stage: int) -> float:
        if microbatch < 0:
            return 0.0
        received = sent(microbatch, stage - 1) if stage else 0.0
        return max(received, end(microbatch - 1, stage)) + stage_times[stage]

    def sent(microbatch: int, boundary: int) -> float:
        if microbatch < 0:
            return 0.0
        return (
            max(end(microbatch, boundary), sent(microbatch - 1, boundary))
            + transfer_times[boundary]
        )

    return end(num_microbatches - 1, num_stages - 1)


@given(st.integers(1, 12), st.integers(1, 40))
def test_equal_stages_have_the_bubble_of_the_formula(num_stages: int, num_batches: int) -> None:
    expected = (num_stages - 1) / (num_batches + num_stages - 1)
    predicted = predict([0.5] * num_stages, num_batches)
    assert predicted.bubble == pytest.approx(expected)
    assert predicted.makespan == pytest.approx(0.5 * (num_batches + num_stages - 1))


@given(st.data(), TIMES, st.integers(1, 4))
def test_unequal_stages_and_transfers(
    data: st.DataObject, stage_times: list[float], num_batches: int
) -> None:
    count = len(stage_times) - 1
    transfers = data.draw(st.lists(st.integers(0, 9).map(float), min_size=count, max_size=count))
    predicted = predict(stage_times, num_batches, transfers)
    assert predicted.makespan == by_recurrence(stage_times, transfers, num_batches)
    idle = 1 - num_batches * sum(stage_times) / (len(stage_times) * predicted.makespan)
    assert predicted.bubble == pytest.approx(idle)


def test_a_pipeline_played_by_hand() -> None:
    # Stage 0 ends at 1, 2, 3; the boundary delivers at 3, 5, 7; stage 1 ends at 6, 9, 12.
    assert predict([1.0, 3.0], 3, [2.0]) == Prediction(12.0, 1 - 12 / 24)
    # With a fast boundary the slow stage never waits after its first: 1 + 3 * 3.
    assert predict([1.0, 3.0], 3).makespan == 10.0
    # The slow stage in front sets the pace, and the last adds its own time: 3 * 3 + 1.
    assert predict([3.0, 1.0], 3).makespan == 10.0
    # A slow boundary sets the pace: 1 + 3 * 4 + 1. Sends overlap with compute.
    assert predict([1.0, 1.0], 3, [4.0]).makespan == 14.0


def test_one_stage_has_no_bubble() -> None:
    assert predict([0.1], 7).bubble == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: predict([], 1), "a pipeline of 0 stages"),
        (lambda: predict([1.0], 0), "0 micro-batches"),
        (lambda: predict([1.0, -1.0], 1), "none may be negative"),
        (lambda: predict([0.0, 0.0], 1), "must take time"),
        (lambda: predict([1.0, 1.0], 1, [1.0, 1.0]), "2 transfer times for 2 stages"),
    ],
)
def test_mistakes_are_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()
