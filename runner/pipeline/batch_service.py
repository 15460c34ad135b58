"""Dynamic batching as a service: requests come from any thread, batches run, futures are answered.

When a batch is cut is the batcher's matter; what a batch computes is `execute`'s.
"""

import logging
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import count
from threading import TIMEOUT_MAX, Condition, Thread
from types import TracebackType
from typing import Generic, TypeVar

from parallel.errors import ConfigError, InternalError, ShardlineError
from runner.pipeline.batch_metrics import BatchMetrics
from runner.pipeline.batcher import Batch, Batcher, QueueFullError
from runner.pipeline.batching_policy import BatchingPolicy
from runner.pipeline.bucket_queue import BatchRequest

P = TypeVar("P")
R = TypeVar("R")

Execute = Callable[[Hashable, list[P]], list[R] | Future[list[R]]]
"""(bucket, payloads) -> one result a payload, in their order, or a future of that.

Called by one thread, one call at a time. Whatever it raises, or its future holds, is given to the
requests of that batch. A pipeline returns a future as soon as its first stage has the batch.
"""

_LOG = logging.getLogger(__name__)


class ServiceClosedError(ShardlineError):
    """A request came after the service was closed, or waited when it was."""


class RequestExpiredError(ShardlineError, TimeoutError):
    """A request was not run because its timeout passed while it waited."""


@dataclass(frozen=True, eq=False)
class _Call(Generic[P, R]):
    """What a request carries through the batcher."""

    payload: P
    future: Future[R]


class BatchService(Generic[P, R]):
    """One thread that cuts batches and calls `execute`.

    Every request is answered exactly once: by its result, by what its batch raised, by
    `RequestExpiredError`, `ServiceClosedError`, or its own cancellation. While `max_in_flight`
    batches run, none is cut, so that what arrives makes the next one larger.

    An `execute` that computes before it returns holds the thread: until then no other batch starts,
    and requests that expire meanwhile hear of it afterwards.
    """

    def __init__(
        self,
        policy: BatchingPolicy,
        execute: Execute[P, R],
        metrics: BatchMetrics,
        *,
        max_in_flight: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            max_in_flight: batches begun and not finished, where `execute` returns futures; the
                number of stages fills a pipeline.
            clock: seconds, running as fast as real ones.

        Raises:
            ConfigError: `max_in_flight` below 1.
        """
        if max_in_flight < 1:
            raise ConfigError(f"max_in_flight={max_in_flight}; use 1 or more")
        self.metrics = metrics
        self._execute = execute
        self._max_in_flight = max_in_flight
        self._clock = clock
        self._ids = count()
        self._batcher: Batcher[_Call[P, R]] = Batcher(policy)
        self._num_in_flight = 0
        self._is_closed = False
        # Guards the three above. No future is answered under it: its callbacks are foreign code.
        self._changed = Condition()
        self._thread = Thread(target=self._run, name="batch-service", daemon=True)
        self._thread.start()

    def __enter__(self) -> "BatchService[P, R]":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(drain=kind is None)

    def submit(
        self, bucket: Hashable, payload: P, *, priority: int = 0, timeout_s: float | None = None
    ) -> Future[R]:
        """Queue one item; its future may be cancelled until its batch starts.

        Args:
            bucket: equal for items that can run in one batch.
            priority: lower runs first.
            timeout_s: it is not begun later than this; None: whenever it can be.

        Raises:
            QueueFullError: `max_queue_size` requests wait.
            ServiceClosedError: the service was closed.
            ConfigError: a timeout that is not above 0.
        """
        if timeout_s is not None and not timeout_s > 0:
            raise ConfigError(f"timeout_s={timeout_s}; use more than 0 seconds, or None for none")
        call = _Call[P, R](payload, Future())
        with self._changed:
            if self._is_closed:
                raise ServiceClosedError("the service is closed; no request is accepted any more")
            now, request_id = self._clock(), next(self._ids)
            deadline_s = None if timeout_s is None else now + timeout_s
            request = BatchRequest(request_id, bucket, call, now, priority, deadline_s)
            try:
                self._batcher.add(request)
            except QueueFullError:
                self.metrics.count("rejected")
                raise
            self.metrics.count("submitted")
            self._changed.notify_all()
        call.future.add_done_callback(lambda future: self._forget(request_id, future))
        return call.future

    def close(self, *, drain: bool = True, timeout_s: float | None = None) -> bool:
        """Accept nothing more, and wait until all is answered. Not from a future's callback.

        Args:
            drain: requests that wait are run; else they end with `ServiceClosedError`.
            timeout_s: requests that wait after this end with `ServiceClosedError`; None: no limit.

        Returns:
            Whether nothing runs any more. False: the time is over and `execute` has not come back;
            it answers its requests when it does.
        """
        with self._changed:
            self._is_closed = True
            if drain:
                self._batcher.drain()
            self._changed.notify_all()
        if drain:
            self._thread.join(timeout_s)
        self._abandon_waiting()
        if not drain:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _forget(self, request_id: int, future: Future[R]) -> None:
        """A future was answered or cancelled; a cancelled one takes no place in queue or batch."""
        if future.cancelled():
            self.metrics.count("cancelled")
            with self._changed:
                self._batcher.cancel(request_id)
                self._changed.notify_all()

    def _abandon_waiting(self) -> None:
        with self._changed:
            requests = self._batcher.take_all()
            self._changed.notify_all()
        for request in requests:
            if request.payload.future.set_running_or_notify_cancel():
                self.metrics.count("abandoned")
                request.payload.future.set_exception(
                    ServiceClosedError("the service was closed before the request ran")
                )

    def _run(self) -> None:
        while self._step():
            pass

    def _step(self) -> bool:
        """Answer what expired and start a batch, once there is either; False: closed and done.

        A method of its own, so that no payload outlives its batch in a local variable.
        """
        expired, batch = self._next_work()
        self._answer_expired(expired)
        if batch is not None:
            self._start(batch)
        return bool(expired) or batch is not None

    def _next_work(self) -> tuple[list[BatchRequest[_Call[P, R]]], Batch[_Call[P, R]] | None]:
        """Wait for requests that expired, a batch to start, or both; neither: closed and done."""
        with self._changed:
            while True:
                now = self._clock()
                has_room = self._num_in_flight < self._max_in_flight
                batch = self._batcher.due(now) if has_room else None
                expired = self._batcher.take_expired(now)
                if batch is not None:
                    self._num_in_flight += 1
                is_idle = not self._batcher.num_waiting and not self._num_in_flight
                if batch is not None or expired or (self._is_closed and is_idle):
                    return expired, batch
                wait_s = (self._batcher.next_due if has_room else self._batcher.next_expiry)(now)
                self._changed.wait(None if wait_s is None else min(wait_s, TIMEOUT_MAX))

    def _answer_expired(self, expired: Sequence[BatchRequest[_Call[P, R]]]) -> None:
        for request in expired:
            if request.payload.future.set_running_or_notify_cancel():
                waited_s = self._clock() - request.arrived_s
                self.metrics.count("expired")
                request.payload.future.set_exception(
                    RequestExpiredError(
                        f"the request waited {waited_s:.3f} s in the queue, longer than its "
                        "timeout; send fewer at once, or give it more time"
                    )
                )

    def _start(self, batch: Batch[_Call[P, R]]) -> None:
        now = self._clock()
        requests = [r for r in batch.requests if r.payload.future.set_running_or_notify_cancel()]
        if not requests:
            self._leave()
            return
        self.metrics.batch_started(batch.reason, [now - r.arrived_s for r in requests])
        futures = [request.payload.future for request in requests]
        outcome: list[R] | Future[list[R]] | BaseException
        try:
            outcome = self._execute(batch.bucket, [r.payload.payload for r in requests])
        # Not `Exception`: a thread that ended here would leave every caller waiting for ever.
        except BaseException as error:
            outcome = error
        if isinstance(outcome, Future):
            outcome.add_done_callback(lambda done: self._finish(futures, _outcome(done), now))
        else:
            self._finish(futures, outcome, now)

    def _finish(
        self, futures: Sequence[Future[R]], outcome: list[R] | BaseException, started_s: float
    ) -> None:
        """Answer a batch's requests, and make room for the next batch."""
        answer = _checked(outcome, len(futures))
        has_failed = isinstance(answer, BaseException)
        if has_failed:
            _LOG.warning("a batch of %d requests failed: %r", len(futures), answer)
        seconds = self._clock() - started_s
        self.metrics.batch_finished(len(futures), seconds, has_failed=has_failed)
        for index, future in enumerate(futures):
            if isinstance(answer, BaseException):
                future.set_exception(answer)
            else:
                future.set_result(answer[index])
        self._leave()

    def _leave(self) -> None:
        with self._changed:
            self._num_in_flight -= 1
            self._changed.notify_all()


def _outcome(done: Future[list[R]]) -> list[R] | BaseException:
    """What a finished future holds."""
    if done.cancelled():
        return InternalError("the future that execute returned was cancelled")
    return done.exception() or done.result()


def _checked(outcome: list[R] | BaseException, num_requests: int) -> list[R] | BaseException:
    """The outcome, if it answers every request; `execute` is not ours, so its type may lie."""
    if isinstance(outcome, BaseException):
        return outcome
    if not isinstance(outcome, list):
        return InternalError(f"execute returned {type(outcome).__name__}, not a list of results")
    if len(outcome) != num_requests:
        return InternalError(f"execute returned {len(outcome)} results for {num_requests} payloads")
    return outcome
