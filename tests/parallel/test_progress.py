"""What ranks are at, seen from another process."""

import os
import subprocess
import sys
import time

import pytest

from parallel.progress import Doing, ProgressBoard


def test_a_new_board_says_that_all_ranks_start() -> None:
    board = ProgressBoard.alone(3)
    for rank in range(3):
        found = board.read(rank)
        assert (found.doing, found.num_steps, found.quiet_s()) == (Doing.STARTING, 0, None)


def test_another_process_writes_its_own_row() -> None:
    fd = ProgressBoard.anonymous_fd(2)
    board = ProgressBoard(fd, 2)
    script = (
        "import sys; from parallel.progress import *; row = ProgressBoard(int(sys.argv[1]), 2)"
        ".writer(1); row.enter(Doing.COMPUTING); row.begin_work(); row.end_step(1.5, 7)"
    )
    before = time.monotonic_ns()
    subprocess.run([sys.executable, "-c", script, str(fd)], pass_fds=[fd], check=True)
    os.close(fd)
    found = board.read(1)
    assert found.doing is Doing.COMPUTING
    assert before < found.since_ns < time.monotonic_ns()
    assert (found.num_steps, found.busy_ns, found.num_compilations) == (1, 1_500_000_000, 7)
    assert found.active_ns > 0
    assert board.read(0).doing is Doing.STARTING


def test_who_does_not_go_on_is_quiet() -> None:
    board = ProgressBoard.alone()
    row = board.writer(0)
    for doing in (Doing.JOINING, Doing.LOADING, Doing.PREPARING):
        row.enter(doing)
        assert board.read(0).quiet_s() is None  # A start may take any time.
    row.enter(Doing.AWAITING)
    time.sleep(0.05)
    quiet_s = board.read(0).quiet_s()
    assert quiet_s is not None
    assert quiet_s >= 0.05
    row.enter(Doing.COMPUTING)
    assert (board.read(0).quiet_s() or 0.0) < quiet_s
    row.enter(Doing.ENDING)
    assert board.read(0).quiet_s() is None


def test_time_without_work_is_not_active() -> None:
    board = ProgressBoard.alone()
    row = board.writer(0)
    row.begin_work()
    time.sleep(0.02)
    row.end_step(0.01, 0)
    time.sleep(0.3)
    row.begin_work()
    row.end_step(0.01, 0)
    found = board.read(0)
    assert found.num_steps == 2
    assert 0.02 <= found.active_ns / 1e9 < 0.3
    row.set_active(3.0)
    assert board.read(0).active_ns == 3_000_000_000


@pytest.mark.parametrize("doing", list(Doing))
def test_everything_has_words(doing: Doing) -> None:
    assert doing.words
