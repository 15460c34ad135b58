"""How far a run is: a bar where someone watches, else a line of JSON now and then.

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
    """A context manager around a run; its rates are those of this run, not of those before it."""

    def __init__(
        self,
        total: int,
        done_before: int = 0,
        *,
        noun: str = "items",
        stream: TextIO | None = None,
        interval_s: float = _INTERVAL_S,
    ) -> None:
        """
        Args:
            total: all items, those that were done before this run among them.
            noun: what the items are.
            stream: None: standard error.
            interval_s: the least time between two lines where there is no terminal.
        """
        self._total = total
        self._before = done_before
        self._noun = noun
        self._stream = stream or sys.stderr
        self._interval_s = interval_s
        self._done = 0
        self._failed = 0
        self._tokens: int | None = None
        self._told = -1
        self._bar: Progress | None = None

    def __enter__(self) -> Self:
        self._started = self._last_line = time.monotonic()
        if self._stream.isatty():
            self._bar = _start_bar(self._noun, self._total, self._before, self._stream)
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
        self._tell()

    def count_tokens(self, num_tokens: int) -> None:
        """So many tokens were generated, for items that need not be done."""
        self._tokens = (self._tokens or 0) + num_tokens
        self._tell()

    def _tell(self) -> None:
        if self._bar is not None:
            task, rates = self._bar.task_ids[0], self._rates()
            shown = ", ".join(f"{rate:.3g} {what}/s" for what, rate in rates.items())
            self._bar.update(
                task, completed=self._before + self._done, failed=self._failed, rates=shown
            )
        elif time.monotonic() - self._last_line >= self._interval_s:
            self._print_line()

    def _rates(self) -> dict[str, float]:
        """What there is a second: items, and tokens if they are counted."""
        elapsed_s = max(time.monotonic() - self._started, 1e-9)
        counts = {self._noun: self._done}
        if self._tokens is not None:
            counts["tokens"] = self._tokens
        return {what: count / elapsed_s for what, count in counts.items()}

    def _print_line(self) -> None:
        done, rates = self._before + self._done, self._rates()
        left = self._total - done
        values = {
            "event": self._noun,
            "done": done,
            "failed": self._failed,
            "total": self._total,
            "percent": round(100 * done / max(self._total, 1), 1),
            **{f"{what}_per_s": float(f"{rate:.3g}") for what, rate in rates.items()},
            "elapsed_s": round(time.monotonic() - self._started, 1),
            "remaining_s": round(left / rates[self._noun], 1) if self._done else None,
        }
        print(json.dumps(values), file=self._stream, flush=True)
        self._last_line = time.monotonic()
        self._told = self._done


def _start_bar(noun: str, total: int, done: int, stream: TextIO) -> "Progress":
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    bar = Progress(
        TextColumn(noun),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[failed]} failed, {task.fields[rates]}, to go"),
        Remaining(),
        console=Console(file=stream),
    )
    bar.add_task(noun, total=total, completed=done, failed=0, rates=f"- {noun}/s")
    bar.start()
    return bar
