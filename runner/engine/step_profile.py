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
        supported = supported_activities()  # type: ignore[no-untyped-call]
        self._activities = supported & {ProfilerActivity.CPU, ProfilerActivity.CUDA}
        self._recording: profile | None = None

    def begin_round(self) -> None:
        """Requests have arrived that no step has seen yet, and nothing of the round before is on
        its way between ranks.
        """
        self.close()
        if self._rounds_before == 0:
            self._recording = profile(activities=self._activities)
            self._recording.start()
        self._rounds_before -= 1

    def end_step(self) -> None:
        """A step has been started. After the last that is recorded the profiler only takes note of
        what began before: a transfer may end later than it, and writes into its memory then.
        """
        if self._recording:
            self._num_steps -= 1
            if self._num_steps == 0:
                self._recording.toggle_collection_dynamic(False, self._activities)

    def close(self) -> None:
        """Write what was recorded, if anything; nothing that began then is still on its way."""
        if self._recording:
            time.sleep(_SETTLE_S)
            self._recording.stop()
            self._recording.export_chrome_trace(str(self._file))
            self._recording = None
