"""`Ledger`: which parts of a bundle that is being built are whole.

A part, an artefact or a rank's weights, is whole once its record is on the disk, and the record
comes last. So a compile that was killed goes on with what is recorded and drops the rest.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from parallel.errors import IntegrityError
from parallel.records import read_record
from runner.bundle.durable import remove, write_text
from runner.bundle.files import FileHash, find_faults, list_files
from runner.bundle.layout import ARTEFACTS, FINISHED, WEIGHTS
from runner.config.json_file import read_json_object


@dataclass(frozen=True)
class Part:
    """A part that is whole.

    Attributes:
        made_from: names what it was made from; a compile that makes it from something else makes
            it again.
        files: relative to the bundle.
    """

    made_from: str
    files: dict[str, FileHash]


class Ledger:
    """The records of a folder; several processes may write different ones."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def record(self, part: str, made_from: str, files: Mapping[str, FileHash]) -> None:
        """Say that a part is whole; its files are on the disk by now."""
        (self._folder / FINISHED).mkdir(exist_ok=True)
        write_text(self._file(part), json.dumps(asdict(Part(made_from, dict(files)))))

    def find(self, part: str) -> Part | None:
        """A part that was recorded; a record that cannot be read counts as none."""
        file = self._file(part)
        try:
            return read_record(Part, read_json_object(file), file.name) if file.exists() else None
        except IntegrityError:
            return None

    def check(self, part: str, made_from: str, below: str) -> str | None:
        """Hash the files of a part anew.

        Args:
            below: the folder or file that holds it.

        Returns:
            What is wrong with it; None: it is whole, and made from this.
        """
        found = self.find(part)
        if found is None:
            return "it was never finished"
        if found.made_from != made_from:
            return "it was made from something else"
        held = self._folder / below
        if not held.exists():
            return "it is absent"
        if held.is_dir() and list_files(self._folder, below) != set(found.files):
            return "it has other files"
        faults = find_faults(self._folder, found.files)
        return str(faults[0]) if faults else None

    def forget(self, part: str) -> None:
        self._file(part).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove artefacts and weights that are not recorded."""
        kept = {file.stem for file in (self._folder / FINISHED).glob("*.json")}
        for path in [p for f in (ARTEFACTS, WEIGHTS) for p in (self._folder / f).glob("*")]:
            if path.name.partition(".")[0] not in kept:
                remove(path)

    def _file(self, part: str) -> Path:
        return self._folder / FINISHED / f"{part}.json"
