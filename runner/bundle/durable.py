"""Writes that are on the disk when they are said to be: aside first, then renamed.

Not here: what is written.
"""

import ctypes
import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from parallel.errors import PreflightError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def write_text(path: Path, text: str) -> None:
    """Write `path` so that a kill leaves the old contents or the new ones."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(text, encoding="utf-8")
    rename(aside, path)


def rename(source: Path, target: Path) -> None:
    """Flush a file, or a folder with all that is in it, and give it its name."""
    if source.is_dir():
        for path in sorted(source.rglob("*")):
            flush(path)
    flush(source)
    source.rename(target)
    flush(target.parent)


def flush(path: Path) -> None:
    """Wait until a file, or the list of names of a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def exchange(first: Path, second: Path) -> bool:
    """Let two folders swap their names at one instant; False where the file system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    names = (os.fsencode(first), os.fsencode(second))
    if libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
        flush(second.parent)
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS):
        return False
    raise OSError(code, os.strerror(code), str(second))


def remove(path: Path) -> None:
    """A file, or a folder with all that is in it; nothing if it is absent."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises PreflightError: the body could not write, because the disk is full for example."""
    try:
        yield
    except OSError as error:
        raise PreflightError(f"cannot write {path}: {error.strerror or error}") from error
