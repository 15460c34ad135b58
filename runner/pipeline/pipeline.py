"""The ranks of a pipeline at work: rank 0 drives, the others follow what reaches them.

Rank 0 is the first rank of the first stage. It takes batches from any thread, computes its stage,
and answers when the results come back from the last stage; meanwhile the next batches are on their
way. When nothing is asked for, an empty message passes through all ranks every second.
"""

import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Lock, Thread

import torch

from parallel.busy_clock import Stopwatch
from parallel.context import ParallelContext
from parallel.errors import RankLostError
from parallel.progress import Doing
from parallel.relay import Header, Order, Relay, wait_for
from runner.pipeline.host_copies import Fetched, copies_for
from runner.pipeline.stage_worker import NUM_SLOTS, StageWorker

_REST_S = 1.0

Sample = Sequence[torch.Tensor]
"""The inputs, or the outputs, of one request, without a batch dim."""


@dataclass(frozen=True)
class _Batch:
    """Samples to compute together; none: the end."""

    bucket: int
    samples: Sequence[Sample]
    answer: Future[list[list[torch.Tensor]]]


@dataclass(frozen=True)
class _Awaited:
    """A batch whose results are on their way."""

    batch: _Batch
    fetched: Fetched


class Pipeline:
    """Rank 0's hand on all stages."""

    def __init__(self, worker: StageWorker, context: ParallelContext, *, is_batched: bool) -> None:
        """
        Args:
            is_batched: the first dim of every input and output counts samples.
        """
        self._worker = worker
        self._context = context
        self._is_batched = is_batched
        self._relay = Relay(context)
        self._copies = copies_for(worker.device)
        self._asked: SimpleQueue[_Batch | None] = SimpleQueue()
        self._awaited: SimpleQueue[_Awaited | None] = SimpleQueue()
        # The next three are guarded by the lock.
        self._occupied = Stopwatch()
        self._open: set[Future[list[list[torch.Tensor]]]] = set()
        self._has_failed = False
        self._lock = Lock()
        self.num_batches = 0
        self.first_s = self.last_s = 0.0

    def submit(self, bucket: int, samples: Sequence[Sample]) -> Future[list[list[torch.Tensor]]]:
        """Queue a batch; may be called from any thread while `drive` runs.

        Args:
            bucket: index of the shapes; no more samples than its batch size.

        Returns:
            For each sample its outputs, on the CPU. They share the memory of their batch, which
            lives as long as one of them.

        Raises:
            RankLostError: `drive` has failed; it says why.
        """
        answer: Future[list[list[torch.Tensor]]] = Future()
        with self._lock:
            if self._has_failed:
                raise _ended()
            if not self._open:
                self._occupied.start()
            self._open.add(answer)
        self._asked.put(_Batch(bucket, samples, answer))
        return answer

    def leave(self) -> None:
        """Let all ranks end when what was submitted is answered."""
        self._asked.put(None)

    def drive(self) -> None:
        """Run what is submitted, until `leave`; on the rank's main thread.

        Whatever it raises, nobody waits on for an answer.
        """
        try:
            self._drive()
        except BaseException:
            self._give_up()
            raise

    def _drive(self) -> None:
        collector = Thread(target=self._collect, name="results", daemon=True)
        collector.start()
        slot = 0
        progress = self._worker.progress
        while True:
            with self._lock:
                progress.set_active(self._occupied.seconds())
            progress.enter(Doing.AWAITING)
            try:
                batch = self._asked.get(timeout=_REST_S)
            except Empty:
                progress.enter(Doing.SENDING)
                self._tell(Header(Order.REST))
                continue
            if batch is None:
                break
            slot = (slot + 1) % NUM_SLOTS
            self._attempt(batch, slot)
        self._awaited.put(None)
        collector.join()
        self._tell(Header(Order.LEAVE))
        self._relay.drain()

    def _tell(self, header: Header) -> None:
        self._relay.announce(header)
        self._relay.send(header)

    def _attempt(self, batch: _Batch, slot: int) -> None:
        """Run a batch. A rank that is alone on a CPU is after an exception what it was before, so
        the batch alone fails; others would wait for what does not come, and a GPU's state is lost.
        """
        try:
            self._run(batch, slot)
        except Exception as error:
            if self._context.topology.world_size > 1 or self._worker.device.type != "cpu":
                raise
            if self._settles(batch.answer):
                batch.answer.set_exception(error)

    def _run(self, batch: _Batch, slot: int) -> None:
        worker, relay = self._worker, self._relay
        self.first_s = self.first_s or time.perf_counter()
        self.num_batches += 1
        buffers = worker.received(batch.bucket, slot)
        rows = list(zip(*batch.samples, strict=True))
        self._copies.put(rows, buffers, slot, after=lambda: relay.finish(slot))
        header = Header(Order.RUN, batch.bucket, slot)
        relay.announce(header)
        relay.share(buffers.values())
        sends = worker.run(batch.bucket, slot)
        worker.progress.enter(Doing.SENDING)
        self._copies.computed(slot)
        program = worker.programs[batch.bucket]
        if self._context.is_last_stage:
            results = [sends[value.name] for value in program.distinct_results]
            fetched = self._copies.fetch(results, slot)
        else:
            relay.send(header, sends.values())
            found = [torch.empty(v.shape, dtype=v.torch_dtype) for v in program.distinct_results]
            pending = relay.receive_results(found)
            fetched = Fetched(found, lambda: wait_for(pending))
        self._awaited.put(_Awaited(batch, fetched))

    def _collect(self) -> None:
        """Answer the batches, in their order."""
        while (awaited := self._awaited.get()) is not None:
            try:
                awaited.fetched.wait()
                answer = self._answer(awaited)
            # Whatever it is, whoever waits must hear of it.
            except Exception as error:
                if self._settles(awaited.batch.answer):
                    awaited.batch.answer.set_exception(error)
                continue
            self.last_s = time.perf_counter()
            if self._settles(awaited.batch.answer):
                awaited.batch.answer.set_result(answer)

    def _settles(self, answer: Future[list[list[torch.Tensor]]]) -> bool:
        """Whether it is still open; whoever calls this answers it."""
        with self._lock:
            is_open = answer in self._open
            self._open.discard(answer)
            if is_open and not self._open:
                self._occupied.stop()
        return is_open

    def _give_up(self) -> None:
        """Answer all that is open: no result will come any more."""
        with self._lock:
            self._has_failed = True
            answers = list(self._open)
            self._open.clear()
        for answer in answers:
            answer.set_exception(_ended())

    def _answer(self, awaited: _Awaited) -> list[list[torch.Tensor]]:
        program = self._worker.programs[awaited.batch.bucket]
        names = [value.name for value in program.distinct_results]
        tensors = awaited.fetched.tensors
        if self._is_batched:
            tensors = [tensor[: len(awaited.batch.samples)] for tensor in tensors]
        found = dict(zip(names, map(_pageable, tensors), strict=True))
        outputs = [found[value.name] for value in program.results]
        if not self._is_batched:
            return [outputs]
        return [list(row) for row in zip(*(x.unbind() for x in outputs), strict=True)]


def _pageable(x: torch.Tensor) -> torch.Tensor:
    """Pinned memory goes back to where it came from, however long results are kept."""
    return x.clone() if x.is_pinned() else x


def _ended() -> RankLostError:
    return RankLostError("the pipeline ended before the results were there", peer=True)
