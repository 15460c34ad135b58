"""How far each rank of a compile is: a line of text a segment, or of JSON where no one watches."""

import json
import sys
import time
from typing import TextIO


class Progress:
    """One rank's account of its share."""

    def __init__(
        self, rank: int, total: int, stream: TextIO | None = None, *, of: str = "segment"
    ) -> None:
        """
        Args:
            total: segments that this rank builds.
            stream: None: standard error.
            of: what is counted.
        """
        self._of = of
        self._rank = rank
        self._total = total
        self._stream = stream or sys.stderr
        self._done = 0
        self._started = time.monotonic()

    def finished(self, what: str, *, how: str) -> None:
        """Tell of one more segment.

        Args:
            how: "tensorrt", for example, or "kept" where nothing was to be done.
        """
        self._done += 1
        elapsed = time.monotonic() - self._started
        remaining = elapsed / self._done * (self._total - self._done)
        percent = 100 * self._done / self._total
        if self._stream.isatty():
            line = (
                f"rank {self._rank}: {self._of} {self._done} of {self._total}, {percent:.0f} %, "
                f"{elapsed:.0f} s, {remaining:.0f} s to go: {what} ({how})"
            )
        else:
            values = {
                "event": self._of,
                "rank": self._rank,
                "done": self._done,
                "total": self._total,
                "percent": round(percent, 1),
                "elapsed_s": round(elapsed, 1),
                "remaining_s": round(remaining, 1),
                "segment": what,
                "how": how,
            }
            line = json.dumps(values)
        print(line, file=self._stream, flush=True)


def announce(phase: str, *, started_s: float) -> None:
    """Tell on standard error what begins now, and how long after the start."""
    elapsed = time.monotonic() - started_s
    line = f"{phase} (after {elapsed:.0f} s)"
    if not sys.stderr.isatty():
        line = json.dumps({"event": "phase", "phase": phase, "elapsed_s": round(elapsed, 1)})
    print(line, file=sys.stderr, flush=True)
