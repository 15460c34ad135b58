"""`TensorFront`: rank 0's side of the clients of a tensor model.

Every sample of every client waits in the one queue of a `BatchService`, which runs those of one
shape together. The routes call `infer` on the server's event loop; `use` runs on a thread of its
own.
"""

import asyncio
import contextlib
import sys
import time
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from threading import Condition
from typing import Any

import torch

from parallel.errors import ConfigError, ShardlineError
from parallel.graph_plan import GraphPlan
from runner.pipeline.batch_service import BatchService, RequestExpiredError, ServiceClosedError
from runner.pipeline.batcher import QueueFullError
from runner.pipeline.batching_policy import BatchingPolicy
from runner.pipeline.buckets import Buckets, Shapes
from runner.pipeline.pipeline import Pipeline, Sample
from runner.serve.errors import ApiError
from runner.serve.lifecycle import State, check_ready, queue_full
from runner.serve.tensors.metrics import TensorMetrics

Results = list[list[torch.Tensor]]
"""Of each sample its outputs."""

_REASONS = {408: "timeout", 429: "refused"}
"""Why a request ended, by the status of its answer; any other is an error."""


LAST = sys.maxsize
"""The priority of a request that names none."""


@dataclass(frozen=True)
class Haste:
    """How soon a request wants its answer.

    Attributes:
        timeout_s: None: it names none.
        priority: of those that wait the lowest goes first.
    """

    timeout_s: float | None = None
    priority: int = LAST


@dataclass(frozen=True)
class _Company:
    """Samples that may share a batch.

    Attributes:
        client: None: with anybody's; else with those of one request.
    """

    shapes: Shapes
    client: int | None = None


class TensorFront:
    """Requests come and go while the pipeline runs."""

    def __init__(
        self,
        plan: GraphPlan,
        policy: BatchingPolicy,
        metrics: TensorMetrics,
        *,
        request_timeout_s: float | None,
    ) -> None:
        """
        Args:
            request_timeout_s: for requests that name none; None: any time.
        """
        self._policy = policy
        self._metrics = metrics
        self._num_stages = len(plan.stages)
        self._buckets = Buckets.of(plan)
        self._request_timeout_s = request_timeout_s
        self._changed = Condition()
        # The rest is guarded by it.
        self._state: State = "starting"
        self._service: BatchService[Sample, list[torch.Tensor]] | None = None
        self._num_open = 0
        self._failures: set[asyncio.Future[Results]] = set()
        self._leave_at: float | None = None

    @property
    def state(self) -> State:
        return self._state

    def use(self, pipeline: Pipeline) -> None:
        """Take requests until the server has drained; see `runner.pipeline.rank.Use`."""

        def execute(company: object, samples: list[Sample]) -> Future[Results]:
            assert isinstance(company, _Company)
            return pipeline.submit(self._buckets.choose(company.shapes, len(samples)), samples)

        service = BatchService(
            self._policy, execute, self._metrics.batches, max_in_flight=self._num_stages + 1
        )
        with self._changed:
            self._service = service
            if self._state == "starting":
                self._state = "ready"
            while not self._leaves():
                left_s = self._leave_at and self._leave_at - time.monotonic()
                self._changed.wait(left_s)
        service.close(drain=False)

    def drain(self, timeout_s: float) -> None:
        """Take no more requests, and leave when those that are open are complete, or time is up."""
        with self._changed:
            if self._state == "failed":
                return  # The launcher ends the rank that told it of a failure.
            self._state = "draining"
            self._leave_at = time.monotonic() + timeout_s
            self._changed.notify_all()

    def fail(self, message: str) -> None:
        """The ranks have ended, or one hangs: no open request will be answered."""
        with self._changed:
            self._state = "failed"
            failures = list(self._failures)
        for failure in failures:
            with contextlib.suppress(RuntimeError):  # The server has ended.
                failure.get_loop().call_soon_threadsafe(_fail, failure, message)

    async def infer(self, samples: Sequence[Sample], haste: Haste) -> Results:
        """Compute samples, in batches with those of others.

        Returns:
            Of each sample its outputs.

        Raises:
            ApiError: they cannot be computed, or not now.
        """
        shapes = tuple(tuple(tensor.shape) for tensor in samples[0])
        self._check(shapes, len(samples))
        if haste.timeout_s is None:
            haste = replace(haste, timeout_s=self._request_timeout_s)
        with self._changed:
            check_ready(self._state)
            self._num_open += 1
            failure: asyncio.Future[Results] = asyncio.get_running_loop().create_future()
            self._failures.add(failure)
        started = time.monotonic()
        try:
            async with asyncio.timeout(haste.timeout_s):
                results = await _unless(failure, self._compute(shapes, samples, haste))
        except TimeoutError:
            self._metrics.finished("timeout")
            raise ApiError(408, "the request took longer than its timeout") from None
        except asyncio.CancelledError:
            self._metrics.finished("cancelled")
            raise
        except ApiError as error:
            self._metrics.finished(_REASONS.get(error.status, "error"))
            raise
        finally:
            with self._changed:
                self._num_open -= 1
                self._failures.discard(failure)
                self._changed.notify_all()
        self._metrics.finished("completed", time.monotonic() - started)
        return results

    def _check(self, shapes: Shapes, num_samples: int) -> None:
        try:
            self._buckets.check(shapes)
        except ConfigError as error:
            raise ApiError(400, str(error)) from None
        most = self._policy.max_queue_size
        if num_samples > most:
            raise ApiError(
                400, f"{num_samples} samples at once; the queue holds {most}, send fewer"
            )

    async def _compute(self, shapes: Shapes, samples: Sequence[Sample], haste: Haste) -> Results:
        """The results; where the model raises, a second time without the samples of others."""
        try:
            return await self._answers(_Company(shapes), samples, haste)
        except _ModelRaisedError:
            alone = _Company(shapes, id(samples))
        try:
            return await self._answers(alone, samples, haste)
        except _ModelRaisedError as error:
            raise ApiError(400, str(error)) from None

    async def _answers(self, company: _Company, samples: Sequence[Sample], haste: Haste) -> Results:
        futures = self._submit(company, samples, haste)
        answers = await asyncio.gather(*map(asyncio.wrap_future, futures), return_exceptions=True)
        results: Results = []
        for answer in answers:
            if isinstance(answer, BaseException):
                raise _told(answer)
            results.append(answer)
        return results

    def _submit(
        self, company: _Company, samples: Sequence[Sample], haste: Haste
    ) -> list[Future[list[torch.Tensor]]]:
        """Queue all samples, or none."""
        assert self._service is not None, "a server that is ready has begun"
        futures: list[Future[list[torch.Tensor]]] = []
        try:
            for sample in samples:
                future = self._service.submit(
                    company, sample, priority=haste.priority, timeout_s=haste.timeout_s
                )
                futures.append(future)
        except ShardlineError as error:
            for future in futures:
                future.cancel()
            raise _told(error) from None
        return futures

    def _leaves(self) -> bool:
        if self._leave_at is None:
            return False
        return not self._num_open or time.monotonic() >= self._leave_at


def _fail(failure: "asyncio.Future[Results]", message: str) -> None:
    if not failure.done():
        failure.set_exception(ApiError(500, message))


async def _unless(
    failure: "asyncio.Future[Results]", work: Coroutine[Any, Any, Results]
) -> Results:
    """What `work` comes to, unless there is a failure before; nothing of it goes on after."""
    computing = asyncio.ensure_future(work)
    try:
        await asyncio.wait({computing, failure}, return_when=asyncio.FIRST_COMPLETED)
        return computing.result() if computing.done() else failure.result()
    finally:
        computing.cancel()


class _ModelRaisedError(Exception):
    """A batch could not be computed, because of one of its samples."""


def _told(error: BaseException) -> Exception:
    """What the request of a sample ends with."""
    match error:
        case QueueFullError():
            return queue_full(str(error))
        case RequestExpiredError():
            return ApiError(408, str(error))
        case ServiceClosedError():
            return ApiError(503, "the server is shutting down")
        case ShardlineError():
            return ApiError(500, str(error))
    return _ModelRaisedError(f"the model raises {type(error).__name__} for these inputs: {error}")
