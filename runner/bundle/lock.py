"""One process at a time: a file that is locked for as long as its holder lives."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from parallel.errors import PreflightError
from runner.bundle.durable import writing


@contextmanager
def exclusive(path: Path, *, writer: str, written: str) -> Iterator[None]:
    """Hold `path` locked; the kernel frees it if this process is killed.

    Args:
        writer, written: such as "compile" and "bundle"; for the message.

    Raises:
        PreflightError: another process holds it, the file system knows no locks, or `path` cannot
            be written.
    """
    descriptor = _acquire(path, writer, written)
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, str(os.getpid()).encode())
        yield
    finally:
        # Removed while it is held: whoever opened it meanwhile sees that it has lost its name.
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _acquire(path: Path, writer: str, written: str) -> int:
    while True:
        with writing(path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 32).decode(errors="replace") or "unknown"
            os.close(descriptor)
            raise PreflightError(
                f"{path}: another {writer} (process {holder}) writes this {written}; wait until "
                f"it ends, or name another folder"
            ) from None
        except OSError as error:
            os.close(descriptor)
            raise PreflightError(
                f"{path}: cannot be locked ({error.strerror}); name a folder on a local disk"
            ) from None
        if _is_named(descriptor, path):
            return descriptor
        os.close(descriptor)


def _is_named(descriptor: int, path: Path) -> bool:
    """Whether the open file still has its name, which its last holder may have removed."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
