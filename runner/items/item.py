"""`Item`: one file of an offline run; its kind, by its suffix, and its stable name.

Not here: which files there are (`listing`), nor what they hold (`reading`).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from parallel.errors import IntegrityError

Kind = Literal["array", "archive", "image", "volume"]

SUFFIXES: dict[str, Kind] = {
    ".npy": "array",
    ".npz": "archive",
    ".png": "image",
    ".jpg": "image",
    ".jpeg": "image",
    ".bmp": "image",
    ".tif": "image",
    ".tiff": "image",
    ".webp": "image",
    ".nii": "volume",
    ".nii.gz": "volume",
}
"""What is read, in lower case; a file's own may be in capitals."""


class ItemError(IntegrityError):
    """One item cannot be used; the others of a run can."""


@dataclass(frozen=True)
class Item:
    """One sample to compute.

    Attributes:
        name: its stable id, and its output's path without the suffix: "sub/scan1" for
            sub/scan1.nii.gz. Relative, with "/", and without "..".
        path: the file.
    """

    name: str
    path: Path

    @property
    def kind(self) -> Kind:
        return SUFFIXES[suffix_of(self.path.name)]

    def error(self, problem: str) -> ItemError:
        """What to raise where this item has a problem; `problem` becomes one line."""
        return ItemError(f"item {self.name}: {' '.join(problem.split())}")


def suffix_of(file_name: str) -> str:
    """The key of SUFFIXES that a file's name ends with; "" where there is none."""
    lower = file_name.lower()
    found = [s for s in SUFFIXES if lower.endswith(s) and len(lower) > len(s)]
    return max(found, key=len, default="")
