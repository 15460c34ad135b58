"""Which ids a run has met: as many as a file of millions of lines has, on the disk.

Not here: what has been answered (`folder`), which is known by the place of a line.
"""

import json
import sqlite3
from types import TracebackType
from typing import Self

from parallel.errors import PreflightError
from runner.prompts.prompt import RequestId


class SeenIds:
    """A set of ids in a temporary database, which the system removes whatever ends the process."""

    def __init__(self) -> None:
        # An empty name: SQLite makes a file where it makes others, once it is worth one.
        self._database = sqlite3.connect("")
        self._database.execute("CREATE TABLE seen (id TEXT PRIMARY KEY) WITHOUT ROWID")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._database.close()

    def add(self, request_id: RequestId) -> bool:
        """Whether the id is new; 1 and "1" are two.

        Raises:
            PreflightError: there is no room for temporary files.
        """
        try:
            added = self._database.execute(
                "INSERT OR IGNORE INTO seen VALUES (?)", (json.dumps(request_id),)
            )
        except sqlite3.OperationalError as error:
            raise PreflightError(
                f"cannot keep the ids of the requests ({error}); let TMPDIR name a folder with room"
            ) from error
        return added.rowcount == 1
