"""One run at a time in an output folder: a lock that the kernel frees when its holder ends.

The lock file stays in the folder, so that nobody can hold one that has lost its name.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from parallel.errors import PreflightError
from runner.bundle.durable import writing

LOCK = ".lock"


@contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Hold a folder that is there.

    Raises:
        PreflightError: another process holds it, the file system knows no locks, or the folder
            cannot be written.
    """
    with writing(folder):
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _acquire(descriptor, folder)
        os.ftruncate(descriptor, 0)
        os.write(descriptor, str(os.getpid()).encode())
        yield
    finally:
        os.close(descriptor)


def _acquire(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(descriptor, 32).decode(errors="replace") or "unknown"
        raise PreflightError(
            f"{folder}: another run (process {holder}) writes this folder; wait until it ends, or "
            f"name another folder"
        ) from None
    except OSError as error:
        raise PreflightError(
            f"{folder}: cannot be locked ({error.strerror}); name a folder on a local disk"
        ) from error
