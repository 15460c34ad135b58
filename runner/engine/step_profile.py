"""A trace of some steps of this rank, by PyTorch's profiler."""

import time
from pathlib import Path

from torch.profiler import ProfilerActivity, profile, supported_activities

_SETTLE_S = 0.1
"""Gloo's threads note the end of a transfer a moment after it was waited for; one that notes it
after the profiler has stopped writes into memory that is free (torch 2.13).
"""


class StepProfile:
    """Records the first steps of one round of requests, and writes them as Chrome's JSON."""

    def __init__(self, file: Path, *, round_index: int, num_steps: int) -> None:
        """
        Args:
            round_index: rounds that begin before the one that is recorded.
            num_steps: most steps; the round's end is the trace's, too.
        """
        self._file = file
        self._rounds_before = round_index
        self._num_steps = num_steps
        self._recording: profile | None = None

    def begin_round(self) -> None:
        """Requests have arrived that no step has seen yet."""
        self._finish()
        if self._rounds_before == 0:
            supported = supported_activities()  # type: ignore[no-untyped-call]
            wanted = {ProfilerActivity.CPU, ProfilerActivity.CUDA}
            self._recording = profile(activities=wanted & supported)
            self._recording.start()
        self._rounds_before -= 1

    def end_step(self) -> None:
        """A step's tokens are on the host, so its kernels have ended; so have its transfers."""
        if self._recording:
            self._num_steps -= 1
            if self._num_steps == 0:
                self._finish()

    def _finish(self) -> None:
        if self._recording:
            time.sleep(_SETTLE_S)
            self._recording.stop()
            self._recording.export_chrome_trace(str(self._file))
            self._recording = None
