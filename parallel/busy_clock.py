"""How long a rank computes: by the host's clock on a CPU, by a stream's events on a GPU; and how
long something went on.
"""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Adds up the time between `start` and `stop`; not safe between threads."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._started: float | None = None

    def start(self) -> None:
        self._started = time.perf_counter()

    def stop(self) -> None:
        self._seconds, self._started = self.seconds(), None

    def seconds(self) -> float:
        """So far, what still goes on included."""
        running = 0.0 if self._started is None else time.perf_counter() - self._started
        return self._seconds + running


class HostClock:
    """Seconds within `running`, where a call returns when its work is done."""

    def __init__(self) -> None:
        self._seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - started

    def reset(self) -> None:
        self._seconds = 0.0

    def seconds(self) -> float:
        return self._seconds

    def seconds_so_far(self) -> float:
        return self._seconds


class StreamClock:
    """The same on a GPU: from the stream's reaching a call's work to its end."""

    _KEPT = 64

    def __init__(self) -> None:
        self._done_s = 0.0
        self._spans: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def running(self) -> Iterator[None]:
        span = _timed_event(), _timed_event()
        span[0].record()
        yield
        span[1].record()
        self._spans.append(span)
        if len(self._spans) > self._KEPT:
            self._add_oldest()

    def reset(self) -> None:
        self._done_s = 0.0
        self._spans.clear()

    def seconds(self) -> float:
        """Waits for what runs."""
        while self._spans:
            self._add_oldest()
        return self._done_s

    def seconds_so_far(self) -> float:
        """Of what is over; waits for nothing."""
        while self._spans and self._spans[0][1].query():  # type: ignore[no-untyped-call]
            self._add_oldest()
        return self._done_s

    def _add_oldest(self) -> None:
        start, stop = self._spans.popleft()
        stop.synchronize()
        self._done_s += start.elapsed_time(stop) / 1e3


def _timed_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def clock_of(device: torch.device) -> HostClock | StreamClock:
    return StreamClock() if device.type == "cuda" else HostClock()
