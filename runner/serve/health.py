"""`Health`: whether every rank of a server goes on, by what their loops write; and a watchdog.

Not here: the state that a front tells its clients (`lifecycle`).
"""

import faulthandler
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from threading import Thread

from parallel.errors import StalledError
from parallel.launch import Failure, RankEnv, report
from parallel.progress import Progress, ProgressBoard
from runner.job import Job
from runner.joining import patience_s

_TOLD_AFTER_S = {"cuda": 15.0, "cpu": 300.0}
"""Half of what a collective may take, which ends the job."""
_LOOK_S = 0.5
_GRACE_S = 1.0
"""How long a collective that passed the same limit has to end its rank in order."""
_LAST_WORDS_S = 1.0
"""How long clients may take to hear that there is no answer."""


@dataclass(frozen=True)
class Stall:
    """A rank that has been at the same thing for too long."""

    rank: int
    name: str
    progress: Progress
    quiet_s: float

    def __str__(self) -> str:
        return (
            f"{self.name}: no progress for {self.quiet_s:.0f} s while {self.progress.doing.words}"
        )


class Health:
    """What is known of the ranks."""

    def __init__(
        self, describe: Callable[[int], str], *, told_after_s: float, patience_s: float
    ) -> None:
        """
        Args:
            describe: a rank's name for messages.
            told_after_s: how long a rank may be at one thing before health says that it stalls.
            patience_s: and how long before the job ends for it.
        """
        self.describe = describe
        self.patience_s = patience_s
        self._told_after_s = min(told_after_s, patience_s)
        self._board: ProgressBoard | None = None

    @classmethod
    def of(cls, job: Job) -> "Health":
        """With the patience that the configuration says."""
        told_after_s = job.config.server.stall_timeout_s or _TOLD_AFTER_S[job.device_type]
        describe = job.plan.topology.describe
        return cls(describe, told_after_s=told_after_s, patience_s=patience_s(job))

    def show(self, board: ProgressBoard) -> None:
        """From now on this is known."""
        self._board = board

    def ranks(self) -> list[Progress]:
        """What each rank is at; none before rank 0 has begun to start."""
        board = self._board
        return [board.read(rank) for rank in range(board.num_ranks)] if board else []

    def stalls(self, *, after_s: float | None = None) -> list[Stall]:
        """Ranks that do not go on: those that only wait for others last, else the one that has
        stood still the longest first.

        Args:
            after_s: how long they have been at one thing; None: as long as is to be told.
        """
        limit_s = self._told_after_s if after_s is None else after_s
        found = []
        for rank, progress in enumerate(self.ranks()):
            quiet_s = progress.quiet_s()
            if quiet_s is not None and quiet_s > limit_s:
                found.append(Stall(rank, self.describe(rank), progress, quiet_s))
        return sorted(found, key=lambda s: (s.progress.doing.is_waiting, s.progress.since_ns))


def watch(health: Health, env: RankEnv, fail: Callable[[str], None]) -> None:
    """End this process when a rank has stalled and no collective has found it out: a rank that is
    alone has none, and rank 0 may be the one that hangs.

    Args:
        fail: tells all clients that there will be no answer.
    """

    def look() -> None:
        while not (stalls := health.stalls(after_s=health.patience_s + _GRACE_S)):
            time.sleep(_LOOK_S)
        # In a thread of its own, for it may need what the loop holds that hangs.
        Thread(target=fail, args=(f"the engine has stalled: {stalls[0]}",), daemon=True).start()
        faulthandler.dump_traceback(all_threads=True)
        time.sleep(_LAST_WORDS_S)
        is_own = stalls[0].rank == env.rank
        if env.report_fd is None:
            print(f"shardline: {stalls[0]}", file=sys.stderr, flush=True)
        report(env, Failure(str(stalls[0]), StalledError.exit_code, secondary=not is_own))
        os._exit(StalledError.exit_code)

    Thread(target=look, name="watchdog", daemon=True).start()
