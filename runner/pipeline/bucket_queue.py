"""The requests that wait in one bucket, in order of service, of urgency and of expiry at once.

Not here: when they become a batch; that is the batcher's.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from enum import StrEnum
from typing import Generic, TypeVar

P = TypeVar("P")


class CutReason(StrEnum):
    """Why a batch was cut from its bucket."""

    FULL = "full"
    """The bucket held `max_batch_size` requests."""
    PREFERRED = "preferred"
    """It held a preferred size, and no larger preferred one."""
    DELAY = "delay"
    """A request had waited `max_queue_delay_ms`."""
    DEADLINE = "deadline"
    """A request's deadline was close."""
    DRAIN = "drain"
    """The service shuts down."""


# Compared by identity: payloads are tensors, whose equality is not a bool.
@dataclass(frozen=True, eq=False)
class BatchRequest(Generic[P]):
    """One item that may run in a batch with others of its bucket.

    Attributes:
        request_id: unique among the requests that wait.
        bucket: equal for requests that can be stacked: shapes and dtypes, say.
        payload: what `execute` is given; opaque.
        arrived_s: the clock's time when it arrived.
        priority: lower runs first.
        deadline_s: the clock's time from which on it is not run any more; None: none.
    """

    request_id: int
    bucket: Hashable
    payload: P
    arrived_s: float
    priority: int = 0
    deadline_s: float | None = None


@dataclass(frozen=True, eq=False)
class Waiting(Generic[P]):
    """A request's place in the queue.

    Attributes:
        number: in order of arrival.
        due_s: when it is to be cut at the latest.
        reason: what makes it due then, `DELAY` or `DEADLINE`.
    """

    request: BatchRequest[P]
    number: int
    due_s: float
    reason: CutReason


class BucketQueue(Generic[P]):
    """Three sorted lists of the same requests; adding and removing look places up by bisection."""

    def __init__(self) -> None:
        self._by_rank: list[Waiting[P]] = []
        self._by_due: list[Waiting[P]] = []
        self._by_deadline: list[Waiting[P]] = []

    def __len__(self) -> int:
        return len(self._by_rank)

    @property
    def most_urgent(self) -> Waiting[P]:
        """The request that is due first; there must be one."""
        return self._by_due[0]

    @property
    def next_deadline_s(self) -> float | None:
        """When the next request expires; None: none will."""
        return self._by_deadline[0].request.deadline_s if self._by_deadline else None

    def add(self, waiting: Waiting[P]) -> None:
        insort(self._by_rank, waiting, key=_rank)
        insort(self._by_due, waiting, key=_due)
        if waiting.request.deadline_s is not None:
            insort(self._by_deadline, waiting, key=_deadline)

    def remove(self, waiting: Waiting[P]) -> None:
        """Args: waiting: one that is in the queue."""
        _remove(self._by_rank, waiting, _rank)
        _remove(self._by_due, waiting, _due)
        if waiting.request.deadline_s is not None:
            _remove(self._by_deadline, waiting, _deadline)

    def take(self, count: int, *, include_most_urgent: bool) -> list[Waiting[P]]:
        """Remove the first `count` requests by priority, then arrival.

        Args:
            include_most_urgent: it has a place among them, if it must be the last one.
        """
        taken = self._by_rank[:count]
        if include_most_urgent and self.most_urgent not in taken:
            taken[-1] = self.most_urgent
        for waiting in taken:
            self.remove(waiting)
        return taken

    def expired(self, now: float) -> list[Waiting[P]]:
        """Those whose deadline has come; they stay in the queue."""
        count = bisect_left(
            self._by_deadline, True, key=lambda waiting: _deadline(waiting)[0] > now
        )
        return self._by_deadline[:count]


def _rank(waiting: Waiting[P]) -> tuple[int, int]:
    return waiting.request.priority, waiting.number


def _due(waiting: Waiting[P]) -> tuple[float, int]:
    return waiting.due_s, waiting.number


def _deadline(waiting: Waiting[P]) -> tuple[float, int]:
    deadline_s = waiting.request.deadline_s
    assert deadline_s is not None, "only requests with a deadline are sorted by it"
    return deadline_s, waiting.number


def _remove(
    waiting: list[Waiting[P]], gone: Waiting[P], key: Callable[[Waiting[P]], tuple[float, int]]
) -> None:
    del waiting[bisect_left(waiting, key(gone), key=key)]
