"""Samples on their way into a stage's buffers, and results on their way out, beside the compute.

On a GPU each way has a stream of its own and pinned memory, so that copying micro-batch n + 1 in
and n - 1 out overlaps with computing n; events order the three. On a CPU there is nothing to
overlap: samples are written into the buffers, results are copied out of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from parallel.errors import InternalError
from runner.pipeline.stage_worker import NUM_SLOTS, Values


@dataclass(frozen=True)
class Fetched:
    """Results on the host; their values are there when `wait` returns."""

    tensors: list[torch.Tensor]
    wait: Callable[[], object]


class HostCopies(Protocol):
    """Between the host and the buffers of a stage."""

    def put(
        self,
        rows: Sequence[Sequence[torch.Tensor]],
        buffers: Values,
        slot: int,
        *,
        after: Callable[[], object],
    ) -> None:
        """Write samples into the buffers of a slot; what lies beyond them is zero.

        Args:
            rows: for each buffer its samples; a buffer without a batch dim has one, of its shape.
            after: waits until the buffers' last values have been sent.
        """
        ...

    def computed(self, slot: int) -> None:
        """Say that what reads the buffers of a slot was started; the next `put` comes after it."""
        ...

    def fetch(self, results: Sequence[torch.Tensor], slot: int) -> Fetched:
        """Begin to bring results to the host; the next `put` comes after it."""
        ...


class DirectCopies:
    """For a stage on the CPU."""

    def put(
        self,
        rows: Sequence[Sequence[torch.Tensor]],
        buffers: Values,
        slot: int,
        *,
        after: Callable[[], object],
    ) -> None:
        del slot
        after()
        for samples, buffer in zip(rows, buffers.values(), strict=True):
            fill(samples, buffer)

    def computed(self, slot: int) -> None:
        """It was, when the call returned."""

    def fetch(self, results: Sequence[torch.Tensor], slot: int) -> Fetched:
        """A copy, since a result may lie in the buffers themselves."""
        del slot
        return Fetched([result.clone() for result in results], lambda: None)


class StreamedCopies:
    """For a stage on a GPU.

    Pinned memory is PyTorch's to keep: it gives a block out again when the copies from and to it
    are done.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._in = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._out = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._computed: list[torch.cuda.Event | None] = [None] * NUM_SLOTS
        self._fetched = [_event() for _ in range(NUM_SLOTS)]

    def put(
        self,
        rows: Sequence[Sequence[torch.Tensor]],
        buffers: Values,
        slot: int,
        *,
        after: Callable[[], object],
    ) -> None:
        staged = [_pinned(buffer) for buffer in buffers.values()]
        for samples, pinned in zip(rows, staged, strict=True):
            fill(samples, pinned)
        # The buffers were made on this stream, perhaps only now.
        made, computed = torch.cuda.current_stream(self._device), self._computed[slot]
        with torch.cuda.stream(self._in):
            # On this stream: waiting on the compute stream would be for what runs now, too.
            after()
            if computed:
                self._in.wait_event(computed)
            else:
                self._in.wait_stream(made)
            self._in.wait_event(self._fetched[slot])
            for pinned, buffer in zip(staged, buffers.values(), strict=True):
                buffer.copy_(pinned, non_blocking=True)
        torch.cuda.current_stream(self._device).wait_stream(self._in)

    def computed(self, slot: int) -> None:
        self._computed[slot] = event = _event()
        event.record(torch.cuda.current_stream(self._device))

    def fetch(self, results: Sequence[torch.Tensor], slot: int) -> Fetched:
        self._out.wait_stream(torch.cuda.current_stream(self._device))
        fetched, done = [_pinned(result) for result in results], _event()
        with torch.cuda.stream(self._out):
            for pinned, result in zip(fetched, results, strict=True):
                pinned.copy_(result, non_blocking=True)
                # Its memory may be given out again on the compute stream, which does not wait.
                result.record_stream(self._out)
            done.record()
        self._fetched[slot] = done
        return Fetched(fetched, done.synchronize)


def _pinned(like: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(like, device="cpu", pin_memory=True)


def copies_for(device: torch.device) -> HostCopies:
    """What moves samples and results between the host and a device."""
    return StreamedCopies(device) if device.type == "cuda" else DirectCopies()


def _event() -> torch.cuda.Event:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]


def fill(samples: Sequence[torch.Tensor], buffer: torch.Tensor) -> None:
    """Put samples into a buffer, one after the other; zeros after them.

    Raises:
        InternalError: a sample has another shape than the buffer's.
    """
    if len(samples) == 1 and samples[0].shape == buffer.shape:
        buffer.copy_(samples[0])
        return
    # What is stacked would be given the shape of the samples, whatever lies behind the buffer.
    if wrong := next((s.shape for s in samples if s.shape != buffer.shape[1:]), None):
        raise InternalError(f"a sample of {list(wrong)} for a buffer of {list(buffer.shape)}")
    # In one call: between several, other threads would take the interpreter.
    torch.stack(list(samples), out=buffer[: len(samples)])
    buffer[len(samples) :].zero_()
