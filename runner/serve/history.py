"""`History`: what a server did in the last minutes, in slots of some seconds, for its page.

Written by the threads that work, read by the server's. Not here: totals since the start, which are
the metrics'; and what is kept of a tensor model (`runner.serve.tensors.history`).
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from threading import Lock
from typing import Any, Generic, TypeVar

from runner.engine.scheduler import Load

SLOT_S = 5
NUM_SLOTS = 120


@dataclass
class Times:
    """Seconds of something that happened in a slot."""

    count: int = 0
    total_s: float = 0.0
    max_s: float = 0.0

    def add(self, seconds: Sequence[float]) -> None:
        self.count += len(seconds)
        self.total_s += sum(seconds)
        self.max_s = max(self.max_s, *seconds, 0.0)


@dataclass
class Slot:
    """What happened in some seconds, whatever the model is; of gauges the highest value.

    Attributes:
        number: seconds of `time.monotonic` in slots.
        failed: requests that were not answered.
        end_to_end: from a request's arrival to the end of its answer.
    """

    number: int
    failed: int = 0
    running: int = 0
    waiting: int = 0
    end_to_end: Times = field(default_factory=Times)


S = TypeVar("S", bound=Slot)


class History(Generic[S]):
    """The last ten minutes."""

    def __init__(self, make_slot: Callable[[int], S]) -> None:
        self._make_slot = make_slot
        self._slots: deque[S] = deque(maxlen=NUM_SLOTS)
        self._lock = Lock()

    def finished(self, seconds: float) -> None:
        """A request has been answered, so long after it came."""
        with self._lock:
            self._slot().end_to_end.add([seconds])

    def failed(self) -> None:
        """A request was not answered."""
        with self._lock:
            self._slot().failed += 1

    def told(self) -> dict[str, Any]:
        """As JSON has it; slots in which nothing happened are left out."""
        with self._lock:
            current = int(time.monotonic() // SLOT_S)
            first = current - NUM_SLOTS
            slots = [
                asdict(s) | {"slots_ago": current - s.number}
                for s in self._slots
                if s.number > first
            ]
        return {"slot_s": SLOT_S, "num_slots": NUM_SLOTS, "slots": slots}

    def _slot(self) -> S:
        """Of this moment; to be asked for under the lock."""
        number = int(time.monotonic() // SLOT_S)
        if not self._slots or self._slots[-1].number != number:
            self._slots.append(self._make_slot(number))
        return self._slots[-1]


@dataclass
class TokenSlot(Slot):
    """Of a language model."""

    tokens: int = 0
    cache_usage: float = 0.0
    first_token: Times = field(default_factory=Times)
    inter_token: Times = field(default_factory=Times)


class TokenHistory(History[TokenSlot]):
    """Of a language model; and how busy it is now."""

    def __init__(self) -> None:
        super().__init__(TokenSlot)
        self._load: Load | None = None

    def show(self, load: Load) -> None:
        """How busy the engine is before a step."""
        with self._lock:
            slot = self._slot()
            slot.running = max(slot.running, load.num_running)
            slot.waiting = max(slot.waiting, load.num_waiting)
            slot.cache_usage = max(slot.cache_usage, load.cache_usage)
            self._load = load

    def tokens(self, first_s: Sequence[float], inter_s: Sequence[float]) -> None:
        """Requests have got tokens, so long after they came or after the tokens before."""
        with self._lock:
            slot = self._slot()
            slot.tokens += len(first_s) + len(inter_s)
            slot.first_token.add(first_s)
            slot.inter_token.add(inter_s)

    def told(self) -> dict[str, Any]:
        """See `History`."""
        return super().told() | {"load": self._load and asdict(self._load)}
