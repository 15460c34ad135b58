"""What every rank of a job is at, in memory that all its processes share.

A rank's own loop writes it and nothing else does: a rank that hangs stops writing, whatever its
other threads do. Who reads it decides nothing that ranks must agree on. Imports no torch.
"""

import mmap
import os
import time
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

_FIELDS = 6
"""Whole numbers of 8 bytes a rank: see `Progress`."""


class Doing(IntEnum):
    """What a rank's loop is at."""

    STARTING = 0
    JOINING = 1
    LOADING = 2
    PREPARING = 3
    AWAITING = 4
    RECEIVING = 5
    COMPUTING = 6
    SENDING = 7
    READING = 8
    ENDING = 9
    COMPILING = 10

    @property
    def is_stepping(self) -> bool:
        """Whether the rank is in its loop, and must go on."""
        return Doing.AWAITING <= self < Doing.ENDING

    @property
    def is_starting(self) -> bool:
        """Whether the rank has not come to its loop yet."""
        return not self.is_stepping and self is not Doing.ENDING

    @property
    def is_waiting(self) -> bool:
        """Whether the rank may stand still because another one does: one that does not send, or
        does not take what is sent to it.
        """
        return self in (Doing.AWAITING, Doing.RECEIVING, Doing.SENDING, Doing.READING)

    @property
    def words(self) -> str:
        """For messages: the rank was stuck or killed while ..."""
        return _WORDS[self]


_WORDS = {
    Doing.STARTING: "starting",
    Doing.JOINING: "joining the other ranks",
    Doing.LOADING: "loading its weights",
    Doing.PREPARING: "preparing to run",
    Doing.AWAITING: "waiting for work",
    Doing.RECEIVING: "receiving from the stage before",
    Doing.COMPUTING: "computing its stage",
    Doing.SENDING: "sending to the next stage",
    Doing.READING: "waiting for a step's tokens",
    Doing.ENDING: "ending",
    Doing.COMPILING: "compiling",
}


@dataclass(frozen=True)
class Progress:
    """A rank as its loop last wrote it.

    Attributes:
        since_ns: when it began what it is doing, on the clock that all processes share.
        num_steps: steps that did work.
        busy_ns: spent computing in these steps.
        active_ns: in which there was work, waiting for other ranks included.
        num_compilations: since the process began.
    """

    doing: Doing
    since_ns: int
    num_steps: int
    busy_ns: int
    active_ns: int
    num_compilations: int

    def quiet_s(self) -> float | None:
        """How long it has been at the same thing; None outside of its loop."""
        return (time.monotonic_ns() - self.since_ns) / 1e9 if self.doing.is_stepping else None


class ProgressBoard:
    """The rows of all ranks."""

    def __init__(self, fd: int, num_ranks: int) -> None:
        """
        Args:
            fd: of shared memory of at least `size_of(num_ranks)` bytes; it can be closed after.
        """
        self.num_ranks = num_ranks
        self._memory = mmap.mmap(fd, self.size_of(num_ranks))
        self._values = memoryview(self._memory).cast("q")

    @staticmethod
    def size_of(num_ranks: int) -> int:
        return num_ranks * _FIELDS * 8

    @classmethod
    def anonymous_fd(cls, num_ranks: int) -> int:
        """Memory for a board that has no name, and is gone with the last process that has it."""
        fd = os.memfd_create("shardline-progress")
        os.ftruncate(fd, cls.size_of(num_ranks))
        return fd

    @classmethod
    def alone(cls, num_ranks: int = 1) -> "ProgressBoard":
        """One that only this process, and those that are told its path, can reach."""
        fd = cls.anonymous_fd(num_ranks)
        try:
            return cls(fd, num_ranks)
        finally:
            os.close(fd)

    @classmethod
    def at(cls, path: Path, num_ranks: int) -> "ProgressBoard":
        """The board of another process, which still has it."""
        fd = os.open(path, os.O_RDWR)
        try:
            return cls(fd, num_ranks)
        finally:
            os.close(fd)

    def read(self, rank: int) -> Progress:
        start = rank * _FIELDS
        doing, *others = self._values[start : start + _FIELDS].tolist()
        return Progress(Doing(doing), *others)

    def writer(self, rank: int) -> "ProgressWriter":
        start = rank * _FIELDS
        return ProgressWriter(self._values[start : start + _FIELDS])


class ProgressWriter:
    """The one hand that writes a rank's row: the thread of its loop."""

    def __init__(self, row: memoryview) -> None:
        self._row = row
        self._active_since_ns = 0

    def enter(self, doing: Doing) -> None:
        """Say what comes now."""
        self._row[0] = doing
        self._row[1] = time.monotonic_ns()

    @property
    def doing(self) -> Doing:
        return Doing(self._row[0])

    def begin_work(self) -> None:
        """Work has come after a time without any, which does not count."""
        self._active_since_ns = time.monotonic_ns()

    def set_active(self, seconds: float) -> None:
        """How long there was work so far, where steps do not tell."""
        self._row[4] = int(seconds * 1e9)

    def end_step(self, busy_s: float, num_compilations: int) -> None:
        """A step that did work is over.

        Args:
            busy_s: computing, so far.
            num_compilations: so far.
        """
        now_ns = time.monotonic_ns()
        self._row[2] += 1
        self._row[3] = int(busy_s * 1e9)
        self._row[4] += now_ns - self._active_since_ns
        self._row[5] = num_compilations
        self._active_since_ns = now_ns
