"""How far a run over items is: a bar where someone watches, else a line of JSON now and then.

Not here: what is done with the items; and the final count, which the folder knows (`writing`).
"""

import json
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress

_INTERVAL_S = 5.0


class ItemProgress:
    """A context manager around a run; its rate is that of this run, not of those before it."""

    def __init__(
        self,
        total: int,
        done_before: int = 0,
        *,
        stream: TextIO | None = None,
        interval_s: float = _INTERVAL_S,
    ) -> None:
        """
        Args:
            total: all items, those that were done before this run among them.
            stream: None: standard error.
            interval_s: the least time between two lines where there is no terminal.
        """
        self._total = total
        self._before = done_before
        self._stream = stream or sys.stderr
        self._interval_s = interval_s
        self._done = 0
        self._failed = 0
        self._told = -1
        self._bar: Progress | None = None

    def __enter__(self) -> Self:
        self._started = self._last_line = time.monotonic()
        if self._stream.isatty():
            self._bar = _start_bar(self._total, self._before, self._stream)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._told != self._done:
            self._print_line()

    def advance(self, *, failed: bool = False) -> None:
        """One more item has a result, or has `failed`."""
        self._done += 1
        self._failed += failed
        if self._bar is not None:
            task = self._bar.task_ids[0]
            self._bar.update(task, advance=1, failed=self._failed, rate=f"{self._rate():.3g}")
        elif time.monotonic() - self._last_line >= self._interval_s:
            self._print_line()

    def _rate(self) -> float:
        """Items per second."""
        return self._done / max(time.monotonic() - self._started, 1e-9)

    def _print_line(self) -> None:
        done = self._before + self._done
        values = {
            "event": "items",
            "done": done,
            "failed": self._failed,
            "total": self._total,
            "percent": round(100 * done / max(self._total, 1), 1),
            "items_per_s": float(f"{self._rate():.3g}"),
            "elapsed_s": round(time.monotonic() - self._started, 1),
            "remaining_s": round((self._total - done) / self._rate(), 1) if self._done else None,
        }
        print(json.dumps(values), file=self._stream, flush=True)
        self._last_line = time.monotonic()
        self._told = self._done


def _start_bar(total: int, done: int, stream: TextIO) -> "Progress":
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    bar = Progress(
        TextColumn("items"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[failed]} failed, {task.fields[rate]} items/s, to go"),
        Remaining(),
        console=Console(file=stream),
    )
    bar.add_task("items", total=total, completed=done, failed=0, rate="-")
    bar.start()
    return bar
