"""`PromptFolder`: results.jsonl and errors.jsonl of a run, in which each prompt has one line.

A line that is there is not written again, so a run that was killed goes on with the prompts that
have none.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from parallel.errors import IntegrityError
from runner.items.failures import FAILURES
from runner.items.json_lines import JsonLines, read_lines
from runner.items.run_record import hold_run_folder
from runner.prompts.prompt import BadLine, Place
from runner.prompts.results import place_of

RESULTS = "results.jsonl"

SYNC_INTERVAL_S = 1.0
"""What a power failure may take away; the next run answers it again."""


class PromptFolder:
    """The folder of one run, held locked. Made by `open_prompt_folder`.

    Attributes:
        num_finished: prompts that have a result, those of earlier runs among them.
        num_failed: lines that have an error, likewise.
        first_failure: where the first of these is, and why; None: there is none.
    """

    def __init__(self, folder: Path, results: JsonLines, failures: JsonLines) -> None:
        """Read what earlier runs wrote.

        Raises:
            IntegrityError: a line is not one of ours.
        """
        self._results = results
        self._failures = failures
        self._told = _Places()
        self.num_failed = 0
        self.first_failure: str | None = None
        self.num_finished = self._read(folder / RESULTS, lambda _: None)
        self._read(folder / FAILURES, self._count_failure)

    def has(self, place: Place) -> bool:
        """Whether a prompt has a result, or an error."""
        return place in self._told

    def write(self, result: Mapping[str, Any]) -> None:
        """Append a result; it survives a kill when this returns.

        Raises:
            PreflightError: the disk is full, for example.
        """
        self._results.append(result)
        self._told.add(place_of(result))
        self.num_finished += 1

    def record_failure(self, bad: BadLine) -> None:
        """Say in errors.jsonl why a line has no result.

        Raises:
            PreflightError: the disk is full, for example.
        """
        failure = {
            "id": bad.id,
            "file": bad.place.file,
            "index": bad.place.line,
            "error": " ".join(bad.reason.split()),
        }
        self._failures.append(failure)
        self._told.add(bad.place)
        self._count_failure(failure)

    def sync(self) -> None:
        """Put what was written on the disk, unless that has just been done."""
        for file in (self._results, self._failures):
            file.sync(interval_s=SYNC_INTERVAL_S)

    def _read(self, path: Path, use: Callable[[Mapping[str, Any]], None]) -> int:
        count = 0
        for number, values in read_lines(path):
            try:
                self._told.add(place_of(values))
                use(values)
            except (KeyError, TypeError, ValueError) as error:
                raise IntegrityError(
                    f"{path}, line {number} does not say of which prompt it is; remove it"
                ) from error
            count += 1
        return count

    def _count_failure(self, failure: Mapping[str, Any]) -> None:
        self.num_failed += 1
        if self.first_failure is None:
            self.first_failure = f"{place_of(failure)}: {failure['error']}"


@contextmanager
def open_prompt_folder(
    folder: Path, settings: Mapping[str, Any], *, overwrite: bool
) -> Iterator[PromptFolder]:
    """Hold a folder for one run; see `hold_run_folder` for what it raises.

    Raises:
        IntegrityError: the folder has lines that are not ours.
    """
    with ExitStack() as stack:
        stack.enter_context(hold_run_folder(folder, settings, overwrite=overwrite))
        results = stack.enter_context(JsonLines(folder / RESULTS))
        failures = stack.enter_context(JsonLines(folder / FAILURES))
        yield PromptFolder(folder, results, failures)


class _Places:
    """A set of places, a bit each."""

    def __init__(self) -> None:
        self._bits: dict[str, bytearray] = {}

    def __contains__(self, place: Place) -> bool:
        index, bit = divmod(place.line, 8)
        bits = self._bits.get(place.file, b"")
        return index < len(bits) and bool(bits[index] >> bit & 1)

    def add(self, place: Place) -> None:
        index, bit = divmod(place.line, 8)
        bits = self._bits.setdefault(place.file, bytearray())
        bits.extend(bytes(max(0, index + 1 - len(bits))))
        bits[index] |= 1 << bit
