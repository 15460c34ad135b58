"""Samples on their way into a stage's buffers, and results on their way out, beside the compute.

On a GPU each way has a stream of its own and pinned memory, so that copying micro-batch n + 1 in
and n - 1 out overlaps with computing n; events order the three. On a CPU there is nothing to
overlap: samples are written into the buffers, results are copied out of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from runner.pipeline.stage_worker import NUM_SLOTS, Values


@dataclass(frozen=True)
class Fetched:
    """Results on the host; their values are there when `wait` returns.

    Attributes:
        tensors: valid until the next fetch from the same slot, on a GPU.
    """

    tensors: list[torch.Tensor]
    wait: Callable[[], object]


class HostCopies(Protocol):
    """Between the host and the buffers of a stage."""

    def put(self, rows: Sequence[Sequence[torch.Tensor]], buffers: Values, slot: int) -> None:
        """Write samples into the buffers of a slot; what lies beyond them is zero.

        Args:
            rows: for each buffer its samples; a buffer without a batch dim has one, of its shape.
        """
        ...

    def fetch(self, results: Sequence[torch.Tensor], slot: int) -> Fetched:
        """Begin to bring results to the host."""
        ...


class DirectCopies:
    """For a stage on the CPU."""

    def put(self, rows: Sequence[Sequence[torch.Tensor]], buffers: Values, slot: int) -> None:
        del slot
        for samples, buffer in zip(rows, buffers.values(), strict=True):
            fill(samples, buffer)

    def fetch(self, results: Sequence[torch.Tensor], slot: int) -> Fetched:
        """A copy, since a result may lie in the buffers themselves."""
        del slot
        return Fetched([result.clone() for result in results], lambda: None)


class StreamedCopies:
    """For a stage on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._in = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._out = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pinned_in: dict[tuple[int, str, torch.Size], torch.Tensor] = {}
        self._pinned_out: dict[tuple[int, int, torch.Size], torch.Tensor] = {}
        self._copied_in = [_event() for _ in range(NUM_SLOTS)]
        self._computed = [_event() for _ in range(NUM_SLOTS)]

    def put(self, rows: Sequence[Sequence[torch.Tensor]], buffers: Values, slot: int) -> None:
        # The pinned memory may still be read for the last micro-batch of this slot.
        self._copied_in[slot].synchronize()
        self._in.wait_event(self._computed[slot])
        with torch.cuda.stream(self._in):
            for samples, (name, buffer) in zip(rows, buffers.items(), strict=True):
                key = slot, name, buffer.shape
                if key not in self._pinned_in:
                    self._pinned_in[key] = torch.empty_like(buffer, device="cpu", pin_memory=True)
                fill(samples, self._pinned_in[key])
                buffer.copy_(self._pinned_in[key], non_blocking=True)
            self._copied_in[slot].record()
        torch.cuda.current_stream(self._device).wait_event(self._copied_in[slot])

    def fetch(self, results: Sequence[torch.Tensor], slot: int) -> Fetched:
        self._computed[slot].record(torch.cuda.current_stream(self._device))
        self._out.wait_event(self._computed[slot])
        fetched = []
        done = _event()
        with torch.cuda.stream(self._out):
            for index, result in enumerate(results):
                key = slot, index, result.shape
                if key not in self._pinned_out:
                    pinned = torch.empty_like(result, device="cpu", pin_memory=True)
                    self._pinned_out[key] = pinned
                fetched.append(self._pinned_out[key].copy_(result, non_blocking=True))
            done.record()
        # The next run in this slot overwrites the results.
        torch.cuda.current_stream(self._device).wait_event(done)
        return Fetched(fetched, done.synchronize)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]


def fill(samples: Sequence[torch.Tensor], buffer: torch.Tensor) -> None:
    """Put samples into a buffer, one after the other; zeros after them."""
    if len(samples) == 1 and samples[0].shape == buffer.shape:
        buffer.copy_(samples[0])
        return
    for index, sample in enumerate(samples):
        buffer[index].copy_(sample)
    buffer[len(samples) :].zero_()
