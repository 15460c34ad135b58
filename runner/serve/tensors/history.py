"""`BatchHistory`: what dynamic batching did in the last minutes, for the page of a tensor model."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from runner.pipeline.batch_metrics import BatchMetrics
from runner.pipeline.bucket_queue import CutReason
from runner.serve.history import History, Slot, Times


@dataclass
class BatchSlot(Slot):
    """Samples and their batches.

    Attributes:
        wait: from a sample's arrival to the start of its batch.
        batch: from the start of a batch to its results.
    """

    samples: int = 0
    batches: int = 0
    wait: Times = field(default_factory=Times)
    batch: Times = field(default_factory=Times)


class BatchHistory(History[BatchSlot]):
    """Of a tensor model; and how busy it is now."""

    def __init__(self) -> None:
        super().__init__(BatchSlot)
        self.batches: BatchMetrics = _Watched(self)

    def started(self, waits_s: Sequence[float]) -> None:
        """A batch has started, whose samples were in the queue so long."""
        with self._lock:
            slot = self._slot()
            slot.batches += 1
            slot.samples += len(waits_s)
            slot.wait.add(waits_s)
        self._look()

    def ended(self, seconds: float) -> None:
        """A batch has its results, so long after it started."""
        with self._lock:
            self._slot().batch.add([seconds])
        self._look()

    def told(self) -> dict[str, Any]:
        """See `History`."""
        load = self._look()
        return super().told() | {"load": load}

    def _look(self) -> dict[str, int]:
        """How busy it is; seen whenever a batch comes or goes, and the page asks."""
        waiting, running = self.batches.queue_depth, self.batches.running
        if waiting or running:
            with self._lock:
                slot = self._slot()
                slot.waiting = max(slot.waiting, waiting)
                slot.running = max(slot.running, running)
        return {"num_running": running, "num_waiting": waiting}


class _Watched(BatchMetrics):
    """Counts, and tells the history."""

    def __init__(self, history: BatchHistory) -> None:
        super().__init__()
        self._history = history

    def batch_started(self, reason: CutReason, waits_s: Sequence[float]) -> None:
        super().batch_started(reason, waits_s)
        self._history.started(waits_s)

    def batch_finished(self, num_requests: int, seconds: float, *, has_failed: bool) -> None:
        super().batch_finished(num_requests, seconds, has_failed=has_failed)
        self._history.ended(seconds)
