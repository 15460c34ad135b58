"""The batching service around a real torch module, under real threads and a real clock."""

import logging
import threading
import time
from collections.abc import Hashable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor

import pytest
import torch
from torch import nn

from parallel.errors import ConfigError, InternalError
from runner.pipeline.batch_metrics import BatchMetrics, BatchSnapshot
from runner.pipeline.batch_service import (
    BatchService,
    Execute,
    RequestExpiredError,
    ServiceClosedError,
)
from runner.pipeline.batcher import QueueFullError
from runner.pipeline.batching_policy import BatchingPolicy

# Waits that should end by an event end here instead, with a failure.
PATIENCE_S = 20.0
SERVER_POLICY = BatchingPolicy(8, 5.0, 1000, (4,))

Answers = Future[torch.Tensor]


@pytest.fixture(autouse=True)
def one_torch_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def model() -> nn.Module:
    """Takes images of any size; its answer depends on every pixel."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(32, 5)).eval()


def batched(model: nn.Module) -> Execute[torch.Tensor, torch.Tensor]:
    @torch.inference_mode()
    def execute(bucket: Hashable, payloads: list[torch.Tensor]) -> list[torch.Tensor]:
        assert {payload.shape for payload in payloads} == {bucket}
        return list(model(torch.stack(payloads)))

    return execute


def images(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(3, 8, 8), (3, 8, 12), (3, 16, 8)]
    return [torch.randn(shapes[i * i % 3], generator=generator) for i in range(count)]


class Gate:
    """An `execute` that holds every batch until it is opened, and notes what came."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.entered = threading.Semaphore(0)
        self.batches: list[list[int]] = []

    def __call__(self, _bucket: Hashable, payloads: list[int]) -> list[int]:
        self.batches.append(payloads)
        self.entered.release()
        assert self.opened.wait(PATIENCE_S)
        return [payload * 10 for payload in payloads]


@pytest.fixture
def gate() -> Iterator[Gate]:
    held = Gate()
    yield held
    held.opened.set()


def occupied(gate: Gate, policy: BatchingPolicy) -> BatchService[int, int]:
    """A service whose thread is held by a first request, 0, of a bucket of its own."""
    service = BatchService(policy, gate, BatchMetrics())
    service.submit("first", 0)
    assert gate.entered.acquire(timeout=PATIENCE_S)
    return service


def settled(snapshot: BatchSnapshot) -> int:
    return (
        snapshot.completed
        + snapshot.failed
        + snapshot.expired
        + snapshot.cancelled
        + snapshot.abandoned
    )


@pytest.mark.parametrize("max_in_flight", [1, 3])
def test_every_answer_is_that_of_its_request(model: nn.Module, max_in_flight: int) -> None:
    """500 requests of three shapes from four threads, run inline and by a pool."""
    inputs, run = images(500), batched(model)
    with ThreadPoolExecutor(max_in_flight) as workers, ThreadPoolExecutor(4) as clients:

        def pooled(bucket: Hashable, payloads: list[torch.Tensor]) -> Future[list[torch.Tensor]]:
            return workers.submit(run, bucket, payloads)  # type: ignore[arg-type]

        execute = run if max_in_flight == 1 else pooled
        metrics = BatchMetrics()
        with BatchService(SERVER_POLICY, execute, metrics, max_in_flight=max_in_flight) as service:
            answers: list[Answers] = list(clients.map(lambda x: service.submit(x.shape, x), inputs))
            results = [answer.result(PATIENCE_S) for answer in answers]
    with torch.inference_mode():
        for image, result in zip(inputs, results, strict=True):
            torch.testing.assert_close(result, model(image[None])[0])
    counts = metrics.snapshot()
    assert (counts.submitted, counts.completed, settled(counts)) == (500, 500, 500)
    assert (counts.running, counts.queue_depth) == (0, 0)
    assert sum(size * number for size, number in counts.by_size.items()) == 500
    assert sum(counts.by_reason.values()) == sum(counts.by_size.values()) == counts.batches
    assert counts.mean_batch_size == 500 / counts.batches
    assert counts.wait_counts[-1] == 500


def test_a_failure_fails_its_batch_alone(
    model: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = BatchMetrics()
    with (
        caplog.at_level(logging.WARNING),
        BatchService(BatchingPolicy(4, 50.0, 100), batched(model), metrics) as service,
    ):
        # Two channels, which the convolution refuses.
        bad = [service.submit((2, 8, 8), torch.zeros(2, 8, 8)) for _ in range(4)]
        good = [service.submit((3, 8, 8), torch.zeros(3, 8, 8)) for _ in range(4)]
        for answer in bad:
            with pytest.raises(RuntimeError, match="channels"):
                answer.result(PATIENCE_S)
        assert [answer.result(PATIENCE_S).shape for answer in good] == [(5,)] * 4
    counts = metrics.snapshot()
    assert (counts.failed, counts.completed) == (4, 4)
    assert "a batch of 4 requests failed" in caplog.text


def raise_system_exit(_bucket: Hashable, _payloads: list[int]) -> list[int]:
    raise SystemExit(1)


def fail_later(_bucket: Hashable, _payloads: list[int]) -> Future[list[int]]:
    later: Future[list[int]] = Future()
    later.set_exception(OSError("a stage is gone"))
    return later


def cancel_later(_bucket: Hashable, _payloads: list[int]) -> Future[list[int]]:
    later: Future[list[int]] = Future()
    later.cancel()
    return later


@pytest.mark.parametrize(
    ("execute", "error", "message"),
    [
        (lambda _bucket, payloads: payloads[1:], InternalError, "2 results for 3 payloads"),
        (lambda _bucket, _payloads: None, InternalError, "NoneType, not a list"),
        (raise_system_exit, SystemExit, "1"),
        (fail_later, OSError, "a stage is gone"),
        (cancel_later, InternalError, "was cancelled"),
    ],
)
def test_whatever_execute_does_its_requests_are_answered(
    execute: Execute[int, int], error: type[BaseException], message: str
) -> None:
    with BatchService(BatchingPolicy(3, 50.0, 10), execute, BatchMetrics()) as service:
        for _ in range(2):
            answers = [service.submit("a", i) for i in range(3)]
            for answer in answers:
                with pytest.raises(error, match=message):
                    answer.result(PATIENCE_S)


def test_a_cancelled_request_never_runs(gate: Gate) -> None:
    service = occupied(gate, BatchingPolicy(4, 0.0, 4))
    answers = [service.submit("a", i) for i in range(1, 5)]
    assert answers[1].cancel()
    answers.append(service.submit("a", 5))
    gate.opened.set()
    assert [answers[i].result(PATIENCE_S) for i in (0, 2, 3, 4)] == [10, 30, 40, 50]
    assert not answers[0].cancel()
    with pytest.raises(CancelledError):
        answers[1].result(PATIENCE_S)
    assert service.close()
    assert gate.batches == [[0], [1, 3, 4, 5]], "its place is another's"
    counts = service.metrics.snapshot()
    assert (counts.cancelled, counts.completed, counts.queue_depth) == (1, 5, 0)


def test_a_request_whose_timeout_passes_never_runs(gate: Gate) -> None:
    service = occupied(gate, BatchingPolicy(4, 0.0, 100))
    late, patient = service.submit("a", 1, timeout_s=0.01), service.submit("a", 2, timeout_s=60)
    time.sleep(0.02)
    gate.opened.set()
    with pytest.raises(RequestExpiredError, match="longer than its timeout"):
        late.result(PATIENCE_S)
    assert patient.result(PATIENCE_S) == 20
    assert service.close()
    assert gate.batches == [[0], [2]]
    assert service.metrics.snapshot().expired == 1


def test_a_timeout_is_answered_in_time_while_the_pipeline_is_full() -> None:
    held: Future[list[int]] = Future()
    service: BatchService[int, int] = BatchService(
        BatchingPolicy(1, 0.0, 10), lambda _bucket, _payloads: held, BatchMetrics()
    )
    first = service.submit("a", 0)
    late = service.submit("a", 1, timeout_s=0.02)
    with pytest.raises(RequestExpiredError):
        late.result(PATIENCE_S)
    assert not first.done()
    held.set_result([7])
    assert first.result(PATIENCE_S) == 7
    assert service.close()


def test_as_many_batches_are_in_flight_as_allowed_and_no_more() -> None:
    begun: list[Future[list[int]]] = []
    third = threading.Event()

    def execute(_bucket: Hashable, _payloads: list[int]) -> Future[list[int]]:
        begun.append(Future())
        if len(begun) == 3:
            third.set()
        return begun[-1]

    metrics = BatchMetrics()
    policy = BatchingPolicy(2, 0.0, 100)
    service = BatchService(policy, execute, metrics, max_in_flight=2)
    answers = [service.submit(bucket, 1) for bucket in "ab"]
    while metrics.snapshot().running < 2:
        time.sleep(0.001)
    answers += [service.submit("c", i) for i in (2, 3)]
    assert not third.wait(0.05)
    assert (metrics.snapshot().running, metrics.snapshot().queue_depth) == (2, 2)
    begun[1].set_result([11])
    assert third.wait(PATIENCE_S)
    assert answers[1].result(PATIENCE_S) == 11
    begun[2].set_result([12, 13])
    begun[0].set_result([10])
    assert [answer.result(PATIENCE_S) for answer in answers] == [10, 11, 12, 13]
    assert service.close()


def test_closing_runs_what_waits(gate: Gate) -> None:
    service = BatchService(BatchingPolicy(4, 1e6, 100), gate, BatchMetrics())
    answers = [service.submit("a", i) for i in range(10)]
    assert gate.entered.acquire(timeout=PATIENCE_S)
    gate.opened.set()
    assert service.close()
    assert [answer.result(0) for answer in answers] == [i * 10 for i in range(10)]
    assert gate.batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert service.metrics.snapshot().by_reason == {"full": 2, "drain": 1}
    with pytest.raises(ServiceClosedError, match="no request is accepted"):
        service.submit("a", 1)
    assert service.close(), "closing twice is closing once"


def test_closing_without_draining_answers_what_waits(gate: Gate) -> None:
    service = occupied(gate, BatchingPolicy(4, 0.0, 100))
    waiting = service.submit("a", 1)
    assert not service.close(drain=False, timeout_s=0.01), "a batch still runs"
    with pytest.raises(ServiceClosedError, match="before the request ran"):
        waiting.result(0)
    gate.opened.set()
    assert service.close(timeout_s=PATIENCE_S)
    assert gate.batches == [[0]]
    counts = service.metrics.snapshot()
    assert (counts.completed, counts.abandoned, counts.queue_depth) == (1, 1, 0)


def test_a_drain_that_takes_too_long_gives_the_rest_up(gate: Gate) -> None:
    service = occupied(gate, BatchingPolicy(4, 0.0, 100))
    waiting = service.submit("a", 1)
    assert not service.close(timeout_s=0.01)
    with pytest.raises(ServiceClosedError):
        waiting.result(0)
    gate.opened.set()
    assert service.close(timeout_s=PATIENCE_S)


def test_a_full_queue_refuses_and_goes_on(gate: Gate) -> None:
    service = occupied(gate, BatchingPolicy(2, 0.0, 2))
    answers = [service.submit("a", i) for i in (1, 2)]
    with pytest.raises(QueueFullError, match="raise max_queue_size"):
        service.submit("a", 3)
    gate.opened.set()
    assert [answer.result(PATIENCE_S) for answer in answers] == [10, 20]
    assert service.submit("a", 3).result(PATIENCE_S) == 30
    assert service.close()
    counts = service.metrics.snapshot()
    assert (counts.rejected, counts.submitted, counts.completed) == (1, 4, 4)


def test_an_answer_may_send_the_next_request(model: nn.Module) -> None:
    with BatchService(SERVER_POLICY, batched(model), BatchMetrics()) as service:
        second: Future[Answers] = Future()
        image = torch.zeros(3, 8, 8)
        first = service.submit(image.shape, image)
        first.add_done_callback(lambda _: second.set_result(service.submit(image.shape, image)))
        answer = second.result(PATIENCE_S).result(PATIENCE_S)
        torch.testing.assert_close(answer, first.result(0))


@pytest.mark.parametrize("timeout_s", [0.0, -1.0, float("nan")])
def test_a_timeout_must_lie_ahead(model: nn.Module, timeout_s: float) -> None:
    with (
        BatchService(SERVER_POLICY, batched(model), BatchMetrics()) as service,
        pytest.raises(ConfigError, match="timeout_s="),
    ):
        service.submit("a", torch.zeros(3, 8, 8), timeout_s=timeout_s)


def test_an_endless_timeout_is_none() -> None:
    held: list[Future[list[int]]] = [Future(), Future()]
    batches = iter(held)
    service: BatchService[int, int] = BatchService(
        BatchingPolicy(1, 0.0, 10), lambda _bucket, _payloads: next(batches), BatchMetrics()
    )
    # The second waits for the pipeline, so that the thread sleeps until its deadline at most.
    answers = [service.submit("a", i, timeout_s=float("inf")) for i in range(2)]
    time.sleep(0.02)
    for number, batch in enumerate(held):
        batch.set_result([number])
    assert [answer.result(PATIENCE_S) for answer in answers] == [0, 1]
    assert service.close()
