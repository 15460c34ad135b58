"""Every rank but rank 0 at work: it runs what reaches it, while the next micro-batch arrives."""

from collections.abc import Iterable
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from queue import SimpleQueue
from threading import Thread

import torch
import torch.distributed as dist

from parallel.context import ParallelContext
from parallel.progress import Doing
from parallel.relay import Header, Order, Relay, wait_for
from runner.pipeline.host_copies import Fetched, copies_for
from runner.pipeline.stage_worker import NUM_SLOTS, StageWorker, Values


def follow(worker: StageWorker, context: ParallelContext) -> None:
    """Run what reaches this rank, until rank 0 says to leave."""
    relay = Relay(context)
    results = _ResultSender(relay, worker) if _sends_results(context) else None
    arrivals = _InStep(relay, worker) if context.is_first_stage else _Ahead(relay, worker)
    while True:
        worker.progress.enter(Doing.AWAITING)
        header = arrivals.next()
        values: Values = {}
        if header.order is Order.RUN:
            if results:
                results.finish(header.slot)
            values = worker.run(header.bucket, header.slot)
        worker.progress.enter(Doing.SENDING)
        if results and header.order is Order.RUN:
            results.send(header, values)
        elif not context.is_last_stage:
            relay.send(header, values.values())
        arrivals.release(header)
        if header.order is Order.LEAVE:
            break
    if results:
        results.close()
    relay.drain()


class _InStep:
    """For the first stage, whose ranks talk in collectives: these must come in one order, so
    nothing is received while something is computed.
    """

    def __init__(self, relay: Relay, worker: StageWorker) -> None:
        self._relay = relay
        self._worker = worker

    def next(self) -> Header:
        """Wait for a header, and for the values that belong to it."""
        header = self._relay.receive_header()
        if header.order is Order.RUN:
            self._relay.finish(header.slot)
            self._relay.share(self._worker.received(header.bucket, header.slot).values())
        return header

    def release(self, header: Header) -> None:
        """There is nothing to overtake."""


class _Ahead:
    """Receives into one slot while the other one is computed."""

    def __init__(self, relay: Relay, worker: StageWorker) -> None:
        self._relay = relay
        self._worker = worker
        self._arrived: SimpleQueue[tuple[Header, list[dist.Work | None]] | Exception]
        self._arrived = SimpleQueue()
        # What must be over on a GPU before a slot is overwritten.
        self._free: list[SimpleQueue[torch.cuda.Event | None]]
        self._free = [SimpleQueue() for _ in range(NUM_SLOTS)]
        for slot in self._free:
            slot.put(None)
        Thread(target=self._run, name="arrivals", daemon=True).start()

    def next(self) -> Header:
        """Wait for a header, and for the values that belong to it.

        Raises:
            RuntimeError: the stage before is gone, or silent for too long.
        """
        arrived = self._arrived.get()
        if isinstance(arrived, Exception):
            raise arrived
        header, pending = arrived
        wait_for(pending)
        return header

    def release(self, header: Header) -> None:
        """What the slot held was computed, and is being sent."""
        if header.order is not Order.RUN:
            return
        event = None
        if self._worker.device.type == "cuda":
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self._worker.device))
        self._free[header.slot].put(event)

    def _run(self) -> None:
        try:
            with _stream_of_its_own(self._worker.device):
                header = Header(Order.REST)
                while header.order is not Order.LEAVE:
                    header = self._relay.receive_header()
                    self._arrived.put((header, list(self._receive(header))))
        # The main thread raises it.
        except Exception as error:
            self._arrived.put(error)

    def _receive(self, header: Header) -> Iterable[dist.Work | None]:
        if header.order is not Order.RUN:
            return ()
        if event := self._free[header.slot].get():
            torch.cuda.current_stream(self._worker.device).wait_event(event)
        self._relay.finish(header.slot)
        buffers = self._worker.received(header.bucket, header.slot)
        return self._relay.begin_receive(buffers.values())


def _stream_of_its_own(device: torch.device) -> AbstractContextManager[object]:
    """On the compute stream of a GPU a receive would begin after all that is queued there."""
    if device.type != "cuda":
        return nullcontext()
    return torch.cuda.stream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]


class _ResultSender:
    """Sends results to rank 0 on a thread of its own; the next micro-batch need not wait."""

    def __init__(self, relay: Relay, worker: StageWorker) -> None:
        self._relay = relay
        self._worker = worker
        self._copies = copies_for(worker.device)
        self._queue: SimpleQueue[tuple[Fetched, Future[None]] | None] = SimpleQueue()
        self._sent: dict[int, Future[None]] = {}
        self._thread = Thread(target=self._run, name="results", daemon=True)
        self._thread.start()

    def send(self, header: Header, values: Values) -> None:
        """Begin to send what the model returns."""
        program = self._worker.programs[header.bucket]
        fetched = self._copies.fetch(
            [values[value.name] for value in program.distinct_results], header.slot
        )
        self._sent[header.slot] = Future()
        self._queue.put((fetched, self._sent[header.slot]))

    def finish(self, slot: int) -> None:
        """Wait until what came from a slot is gone."""
        if sent := self._sent.pop(slot, None):
            sent.result()

    def close(self) -> None:
        """Wait until all is gone, or raise why it cannot go."""
        self._queue.put(None)
        self._thread.join()
        for slot in list(self._sent):
            self.finish(slot)

    def _run(self) -> None:
        while (job := self._queue.get()) is not None:
            fetched, sent = job
            try:
                fetched.wait()
                self._relay.send_results(fetched.tensors)
            # The main thread raises it.
            except Exception as error:
                sent.set_exception(error)
                continue
            sent.set_result(None)


def _sends_results(context: ParallelContext) -> bool:
    here = context.coordinate
    return context.is_last_stage and here.stage > 0 and here.tp_rank == 0
