"""`GpuMonitor`: the GPUs of a running job, read again and again, and the XID errors meanwhile.

Not here: what a reading is called where it is shown (`runner.serve.gpu_metrics`).
"""

import time
from contextlib import suppress
from threading import Lock
from typing import Any

from runner.observe.nvml import Gpu, Inventory, read_inventory

_FRESH_S = 1.0
"""Readers that ask more often share a reading."""


class GpuMonitor:
    """Reads when it is asked; has no thread."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._xids = XidWatch()
        self._inventory: Inventory | None = None
        self._read_at = 0.0

    @property
    def last_xids(self) -> dict[int, int]:
        """The last XID error of each GPU that had one, since the monitor was made."""
        return self._xids.last

    def read(self) -> Inventory:
        """The GPUs now, or a second ago; called from any thread."""
        with self._lock:
            now = time.monotonic()
            if self._inventory is None or now - self._read_at >= _FRESH_S:
                self._xids.poll()
                self._inventory = read_inventory(with_pairs=False)
                self._read_at = now
            return self._inventory


class XidWatch:
    """Errors that the driver reports of GPUs: XID 79 is one that has fallen off the bus.

    Attributes:
        last: by the index of the GPU.
    """

    def __init__(self) -> None:
        import pynvml

        self._library = pynvml
        self.last: dict[int, int] = {}
        self._events: Any = None
        with suppress(pynvml.NVMLError):
            # Never shut down: the events end with this process.
            pynvml.nvmlInit()
            self._events = pynvml.nvmlEventSetCreate()
            for index in range(pynvml.nvmlDeviceGetCount()):
                self._register(index)

    def poll(self) -> None:
        """Take what has been reported; does not wait."""
        while self._events is not None:
            try:
                event = self._library.nvmlEventSetWait_v2(self._events, 0)
                index = self._library.nvmlDeviceGetIndex(event.device)
            except self._library.NVMLError:
                return
            self.last[index] = event.eventData

    def _register(self, index: int) -> None:
        library = self._library
        with suppress(library.NVMLError):
            handle = library.nvmlDeviceGetHandleByIndex(index)
            library.nvmlDeviceRegisterEvents(
                handle, library.nvmlEventTypeXidCriticalError, self._events
            )


def gpus_of_ranks(
    gpus: tuple[Gpu, ...], devices: tuple[int, ...], visible: str | None
) -> dict[int, Gpu]:
    """Rank -> its GPU, where there is one.

    Args:
        devices: of each rank, as torch counts them.
        visible: CUDA_VISIBLE_DEVICES, by which torch counts; None: all GPUs.
    """
    shown = list(gpus) if visible is None else [_named(gpus, word) for word in visible.split(",")]
    found = {rank: shown[d] for rank, d in enumerate(devices) if d < len(shown)}
    return {rank: gpu for rank, gpu in found.items() if gpu is not None}


def _named(gpus: tuple[Gpu, ...], word: str) -> Gpu | None:
    """A GPU by its index, or by the beginning of its UUID."""
    word = word.strip()
    if word.isdecimal():
        return next((gpu for gpu in gpus if gpu.index == int(word)), None)
    return next((gpu for gpu in gpus if word and (gpu.uuid or "").startswith(word)), None)
