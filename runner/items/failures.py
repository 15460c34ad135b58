"""errors.jsonl: the items that could not be computed, one line each time, and why.

A line is never removed; whether an item is still to be done is said by its result.
"""

import json
import os
from pathlib import Path

from parallel.errors import IntegrityError
from runner.items.item import Item, ItemError
from runner.items.json_lines import cut_torn_line

FAILURES = "errors.jsonl"


class Failures:
    """The file of one folder; one process at a time writes it."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / FAILURES

    def record(self, item: Item, error: ItemError) -> None:
        """Append a line; it is on the disk when this returns."""
        line = {"item": item.name, "path": str(item.path), "error": str(error)}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def cut_torn_line(self) -> None:
        """Cut off a line that a killed run did not end, or the next one would go on in it."""
        if self._path.exists():
            cut_torn_line(self._path)

    def last(self) -> dict[str, str]:
        """{item: what was said of it last}.

        Raises:
            IntegrityError: a line is not one of ours.
        """
        if not self._path.exists():
            return {}
        said = {}
        for number, line in enumerate(self._path.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                values = json.loads(line)
                said[values["item"]] = values["error"]
            except (ValueError, KeyError, TypeError) as error:
                raise IntegrityError(
                    f"{self._path}, line {number} does not name an item and its error; remove it"
                ) from error
        return said
