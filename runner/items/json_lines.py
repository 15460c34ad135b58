"""A file of JSON lines that a run appends to: each is whole, or is cut off by the next run."""

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from parallel.errors import IntegrityError, PreflightError
from runner.bundle.durable import flush, writing

_BLOCK_BYTES = 2**16


class JsonLines:
    """The file, open for appending; one process at a time writes it."""

    def __init__(self, path: Path) -> None:
        """Open or create it, and cut off a line that a killed run did not end.

        Raises:
            PreflightError: it cannot be written.
        """
        self._path = path
        with writing(path):
            self._file = path.open("ab", buffering=0)
            cut_torn_line(path)
            flush(path.parent)
        self._is_dirty = False
        self._synced_s = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.sync()
        finally:
            self._file.close()

    def append(self, values: Mapping[str, Any]) -> None:
        """Write a line; it survives a kill when this returns, and a power failure after `sync`.

        Raises:
            PreflightError: the disk is full, for example; the line is not there then.
        """
        # Half a surrogate pair, which UTF-8 cannot hold, becomes its JSON escape.
        text = json.dumps(values, ensure_ascii=False) + "\n"
        rest = memoryview(text.encode("utf-8", errors="backslashreplace"))
        try:
            with writing(self._path):
                self._is_dirty = True
                while rest:
                    rest = rest[self._file.write(rest) :]
        except PreflightError:
            with suppress(OSError):  # The next run does it otherwise.
                cut_torn_line(self._path)
            raise

    def sync(self, *, interval_s: float = 0.0) -> None:
        """Wait until all is on the disk, unless that was less than `interval_s` ago.

        Raises:
            PreflightError: it cannot be written.
        """
        if self._is_dirty and time.monotonic() - self._synced_s >= interval_s:
            with writing(self._path):
                os.fsync(self._file.fileno())
            self._is_dirty = False
            self._synced_s = time.monotonic()


def cut_torn_line(path: Path) -> None:
    """Cut off what follows the last line break; the next line would go on in it."""
    with path.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        while end:
            begin = max(0, end - _BLOCK_BYTES)
            file.seek(begin)
            line_break = file.read(end - begin).rfind(b"\n")
            if line_break >= 0:
                end = begin + line_break + 1
                break
            end = begin
        file.truncate(end)


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The lines and their numbers, from 1.

    Raises:
        IntegrityError: a line is no JSON object.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                values = json.loads(line)
            except ValueError:
                values = None
            if not isinstance(values, dict):
                raise IntegrityError(f"{path}, line {number} is no JSON object; remove it")
            yield number, values
