"""A rank that stands still is found by what its loop last wrote; the bubble by what all wrote."""

import time

import pytest

from parallel.progress import Doing, ProgressBoard
from parallel.topology import Topology
from runner.serve.health import Health
from runner.serve.rank_metrics import RankMetrics, bubble


def health_of(board: ProgressBoard, patience_s: float = 5.0) -> Health:
    health = Health(lambda rank: f"rank {rank}", told_after_s=0.1, patience_s=patience_s)
    health.show(board)
    return health


def test_nothing_is_known_before_there_is_a_board() -> None:
    health = Health(str, told_after_s=1.0, patience_s=1.0)
    assert (health.ranks(), health.stalls()) == ([], [])
    assert list(RankMetrics(health, Topology.of([1])).collect()) == []


def test_the_rank_that_stood_still_first_is_named_first() -> None:
    board = ProgressBoard.alone(3)
    for rank, doing in ((2, Doing.COMPUTING), (0, Doing.READING)):
        board.writer(rank).enter(doing)
        time.sleep(0.02)
    health = health_of(board)
    assert health.stalls() == []
    time.sleep(0.15)
    stalls = health.stalls()
    assert [stall.rank for stall in stalls] == [2, 0]
    assert str(stalls[0]) == "rank 2: no progress for 0 s while computing its stage"
    assert health.stalls(after_s=health.patience_s) == []
    board.writer(2).enter(Doing.AWAITING)
    assert [stall.rank for stall in health.stalls()] == [0]


def test_a_rank_that_waits_for_others_is_named_after_them() -> None:
    board = ProgressBoard.alone(3)
    for rank, doing in ((0, Doing.READING), (1, Doing.RECEIVING), (2, Doing.COMPUTING)):
        board.writer(rank).enter(doing)
        time.sleep(0.01)
    time.sleep(0.12)
    assert [stall.rank for stall in health_of(board).stalls()] == [2, 0, 1]


def test_who_takes_nothing_is_named_before_the_rank_that_sends_to_it() -> None:
    """An idle one that was stopped, upon which the next empty message does not go through."""
    board = ProgressBoard.alone(3)
    for rank, doing in ((1, Doing.AWAITING), (2, Doing.AWAITING), (0, Doing.SENDING)):
        board.writer(rank).enter(doing)
        time.sleep(0.01)
    time.sleep(0.12)
    assert [stall.rank for stall in health_of(board).stalls()] == [1, 2, 0]


def test_health_tells_no_later_than_the_job_ends() -> None:
    board = ProgressBoard.alone(1)
    board.writer(0).enter(Doing.COMPUTING)
    time.sleep(0.02)
    health = Health(str, told_after_s=60.0, patience_s=0.01)
    health.show(board)
    assert len(health.stalls()) == 1


def test_the_bubble_is_what_ranks_did_not_compute() -> None:
    board = ProgressBoard.alone(2)
    assert bubble(health_of(board).ranks()) == 0.0
    for rank, busy_s in enumerate((3.0, 1.0)):
        row = board.writer(rank)
        row.begin_work()
        row.end_step(busy_s, rank)
        row.set_active(4.0)
    assert bubble(health_of(board).ranks()) == pytest.approx(0.5)
    families = RankMetrics(health_of(board), Topology.of([1, 1])).collect()
    samples = {
        (sample.name, sample.labels.get("stage")): sample.value
        for family in families
        for sample in family.samples
    }
    assert samples["shardline_rank_step_seconds_sum", "0"] == 3.0
    assert samples["shardline_rank_step_seconds_count", "1"] == 1
    assert samples["shardline_rank_compilations_total", "1"] == 1
    assert samples["shardline_pipeline_bubble", None] == pytest.approx(0.5)
