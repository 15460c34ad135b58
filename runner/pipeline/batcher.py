"""Dynamic batching as a pure policy: which requests run together, and when.

It is told the time and never looks at a clock; it has no thread and no lock. Not here: running the
batches; that is `batch_service`.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from parallel.errors import ConfigError, ShardlineError
from runner.pipeline.batching_policy import BatchingPolicy
from runner.pipeline.bucket_queue import BatchRequest, BucketQueue, CutReason, Waiting

P = TypeVar("P")


class QueueFullError(ShardlineError):
    """A request was refused because as many wait as may."""


@dataclass(frozen=True, eq=False)
class Batch(Generic[P]):
    """Requests of one bucket that run together, by priority, then arrival."""

    bucket: Hashable
    requests: tuple[BatchRequest[P], ...]
    reason: CutReason


class Batcher(Generic[P]):
    """The requests that wait, each in its bucket's queue.

    A bucket is cut as soon as one of these holds, tried in this order:

    - it holds `max_batch_size` requests: these (full);
    - the batcher drains: all (drain);
    - a preferred size can be formed and no request is overdue, or the delay is 0: the largest such
      size (preferred);
    - its most urgent request is due, because it has waited `max_queue_delay_ms` (delay) or its
      deadline is closer than `deadline_margin_ms` (deadline): all.

    Preferred sizes and the delay mean what they mean in Triton's dynamic batcher, except that a
    bucket of `max_batch_size` goes whole, where Triton would prefer a smaller preferred size until
    the delay is over.

    A batch takes requests by priority, then arrival; but the most urgent one, once it is overdue,
    is in its bucket's next batch whatever its priority. Of several buckets that can be cut, the one
    goes first whose most urgent request is due first.

    Nothing starves, then: what arrives after a request has become overdue is due later, and cannot
    hold it up. With k requests due before it, of whatever bucket, it is in one of the next k + 1
    batches. While it is not overdue, higher priorities do pass it.
    """

    def __init__(self, policy: BatchingPolicy) -> None:
        self.policy = policy
        self._queues: dict[Hashable, BucketQueue[P]] = {}
        self._waiting: dict[int, Waiting[P]] = {}
        self._expired: list[BatchRequest[P]] = []
        self._num_added = 0
        self._is_draining = False

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def add(self, request: BatchRequest[P]) -> None:
        """Queue a request; it is now its `arrived_s`.

        Raises:
            QueueFullError: `max_queue_size` requests wait already.
            ConfigError: one of this id waits already.
        """
        self._expire(request.arrived_s)
        if request.request_id in self._waiting:
            raise ConfigError(f"request {request.request_id} waits already; ids must differ")
        if self.num_waiting >= self.policy.max_queue_size:
            raise QueueFullError(
                f"{self.num_waiting} requests wait, and max_queue_size is "
                f"{self.policy.max_queue_size}; send again later, or raise max_queue_size"
            )
        waiting = self._placed(request)
        self._num_added += 1
        self._waiting[request.request_id] = waiting
        self._queues.setdefault(request.bucket, BucketQueue()).add(waiting)

    def cancel(self, request_id: int) -> bool:
        """Forget a request; False: it does not wait here (any more)."""
        waiting = self._waiting.get(request_id)
        if waiting is not None:
            self._queues[waiting.request.bucket].remove(waiting)
            self._forget([waiting])
        return waiting is not None

    def drain(self) -> None:
        """From now on nothing waits for others to join it."""
        self._is_draining = True

    def take_all(self) -> list[BatchRequest[P]]:
        """Remove every request that waits, in order of arrival; none of them has been run."""
        requests = [waiting.request for waiting in self._waiting.values()]
        self._waiting.clear()
        self._queues.clear()
        return requests

    def take_expired(self, now: float) -> list[BatchRequest[P]]:
        """Remove the requests whose deadline has come; each is returned once and never runs."""
        self._expire(now)
        expired, self._expired = self._expired, []
        return expired

    def due(self, now: float) -> Batch[P] | None:
        """Cut the next batch; None: nothing can run yet. To be called until it returns None."""
        self._expire(now)
        cuts = [
            (queue.most_urgent, cut)
            for queue in self._queues.values()
            if (cut := self._cut(queue, now))
        ]
        if not cuts:
            return None
        urgent, (size, reason) = min(cuts, key=lambda pair: (pair[0].due_s, pair[0].number))
        bucket = urgent.request.bucket
        taken = self._queues[bucket].take(size, include_most_urgent=urgent.due_s <= now)
        self._forget(taken)
        return Batch(bucket, tuple(waiting.request for waiting in taken), reason)

    def next_due(self, now: float) -> float | None:
        """Seconds until a batch can be cut or a request expires, if none arrives; None: never."""
        if self._expired or any(self._cut(queue, now) for queue in self._queues.values()):
            return 0.0
        times = [queue.most_urgent.due_s for queue in self._queues.values()]
        next_expiry = self.next_expiry(now)
        waits = [max(0.0, time - now) for time in times]
        return min(waits if next_expiry is None else [*waits, next_expiry], default=None)

    def next_expiry(self, now: float) -> float | None:
        """Seconds until a request expires; None: none will."""
        if self._expired:
            return 0.0
        deadlines = [queue.next_deadline_s for queue in self._queues.values()]
        return min((max(0.0, d - now) for d in deadlines if d is not None), default=None)

    def _placed(self, request: BatchRequest[P]) -> Waiting[P]:
        due_s = request.arrived_s + self.policy.max_queue_delay_ms / 1000
        reason = CutReason.DELAY
        if request.deadline_s is not None:
            latest_s = request.deadline_s - self.policy.deadline_margin_ms / 1000
            if latest_s < due_s:
                # Not before its arrival: short deadlines would else pass requests long overdue.
                due_s, reason = max(request.arrived_s, latest_s), CutReason.DEADLINE
        return Waiting(request, self._num_added, due_s, reason)

    def _cut(self, queue: BucketQueue[P], now: float) -> tuple[int, CutReason] | None:
        """How many requests to cut from a bucket now, and why; None: none."""
        policy, num_waiting = self.policy, len(queue)
        is_overdue = queue.most_urgent.due_s <= now
        if num_waiting >= policy.max_batch_size:
            return policy.max_batch_size, CutReason.FULL
        if self._is_draining:
            return num_waiting, CutReason.DRAIN
        preferred = policy.largest_preferred(num_waiting)
        if preferred and (not is_overdue or policy.max_queue_delay_ms == 0):
            return preferred, CutReason.PREFERRED
        return (num_waiting, queue.most_urgent.reason) if is_overdue else None

    def _expire(self, now: float) -> None:
        for queue in list(self._queues.values()):
            expired = queue.expired(now)
            for waiting in expired:
                queue.remove(waiting)
            self._forget(expired)
            self._expired += [waiting.request for waiting in expired]

    def _forget(self, removed: list[Waiting[P]]) -> None:
        """Drop what left its queue, and the queue if it is empty now."""
        for waiting in removed:
            del self._waiting[waiting.request.request_id]
            bucket = waiting.request.bucket
            if bucket in self._queues and not self._queues[bucket]:
                del self._queues[bucket]
