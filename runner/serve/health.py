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

    def __init__(self, describe: Callable[[int], str], patience_s: float) -> None:
        """
        Args:
            describe: a rank's name for messages.
            patience_s: how long a rank may be at one thing.
        """
        self.describe = describe
        self._patience_s = patience_s
        self._board: ProgressBoard | None = None

    def show(self, board: ProgressBoard) -> None:
        """From now on this is known."""
        self._board = board

    def ranks(self) -> list[Progress]:
        """What each rank is at; none before rank 0 has begun to start."""
        board = self._board
        return [board.read(rank) for rank in range(board.num_ranks)] if board else []

    def stalls(self, *, grace_s: float = 0.0) -> list[Stall]:
        """Ranks that do not go on, the one that has stood still the longest first."""
        found = []
        for rank, progress in enumerate(self.ranks()):
            quiet_s = progress.quiet_s()
            if quiet_s is not None and quiet_s > self._patience_s + grace_s:
                found.append(Stall(rank, self.describe(rank), progress, quiet_s))
        return sorted(found, key=lambda stall: stall.progress.since_ns)


def watch(health: Health, env: RankEnv, fail: Callable[[str], None]) -> None:
    """End this process when a rank has stalled and no collective has found it out: a rank that is
    alone has none, and rank 0 may be the one that hangs.

    Args:
        fail: tells all clients that there will be no answer.
    """

    def look() -> None:
        while not (stalls := health.stalls(grace_s=_GRACE_S)):
            time.sleep(_LOOK_S)
        fail(f"the engine has stalled: {stalls[0]}")
        faulthandler.dump_traceback(all_threads=True)
        time.sleep(_LAST_WORDS_S)
        is_own = stalls[0].rank == env.rank
        if env.report_fd is None:
            print(f"shardline: {stalls[0]}", file=sys.stderr, flush=True)
        report(env, Failure(str(stalls[0]), StalledError.exit_code, secondary=not is_own))
        os._exit(StalledError.exit_code)

    Thread(target=look, name="watchdog", daemon=True).start()
