"""Whether a command may write the folder that its user named."""

import os
from pathlib import Path

from parallel.errors import ConfigError


def check_output_folder(out: Path, *, overwrite: bool, marker: str) -> None:
    """A folder may be written that is absent or empty, or with `overwrite` one of our own kind.

    Args:
        marker: the file that says that a folder is of this kind.

    Raises:
        ConfigError: something is at `out` that may not be replaced.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise ConfigError(f"{out} is a file; name a folder that is empty or not there yet")
    if out.is_mount():
        raise ConfigError(f"{out} is a mount point, which cannot be replaced; name a folder in it")
    if not any(out.iterdir()):
        return
    if not overwrite:
        raise ConfigError(f"{out} is not empty; name another folder, or use --overwrite")
    if not (out / marker).is_file():
        raise ConfigError(f"{out} has no {marker}, so --overwrite does not replace it")


def check_writable(folder: Path) -> None:
    """Look whether a folder can be written, or made where it is absent.

    Raises:
        ConfigError: it cannot.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        problem = "cannot be written" if there.is_dir() else "is a file"
        raise ConfigError(f"{folder} cannot be written: {there} {problem}; name another folder")
