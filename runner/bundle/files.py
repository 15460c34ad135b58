"""Files of a bundle by size and sha256: hashed once, compared on many threads.

Large files are hashed in chunks, too, so that one file is no matter of one thread. Not here: which
files there should be; that is the manifest's.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

CHUNK_BYTES = 64 * 2**20
_BLOCK_BYTES = 4 * 2**20
_MAX_THREADS = 32
_SHOWN_DIGITS = 16


@dataclass(frozen=True)
class FileHash:
    """What a file holds.

    Attributes:
        size: in bytes.
        sha256: of the whole file, as `sha256sum` prints it.
        chunks: sha256 of every 64 MiB, where the file is larger than that; else empty.
    """

    size: int
    sha256: str
    chunks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fault:
    """A file that is not what it should be."""

    file: str
    problem: str

    def __str__(self) -> str:
        return f"{self.file}: {self.problem}"


class Hasher:
    """Makes a `FileHash` from bytes as they come."""

    def __init__(self) -> None:
        self._whole = hashlib.sha256()
        self._chunk = hashlib.sha256()
        self._chunks: list[str] = []
        self._size = 0

    def update(self, data: memoryview) -> None:
        """Args: data: one-dimensional, of bytes."""
        while data:
            part = data[: CHUNK_BYTES - self._size % CHUNK_BYTES]
            self._whole.update(part)
            self._chunk.update(part)
            self._size += len(part)
            if self._size % CHUNK_BYTES == 0:
                self._chunks.append(self._chunk.hexdigest())
                self._chunk = hashlib.sha256()
            data = data[len(part) :]

    def finish(self) -> FileHash:
        chunks = self._chunks
        if self._size % CHUNK_BYTES:
            chunks = [*chunks, self._chunk.hexdigest()]
        return FileHash(self._size, self._whole.hexdigest(), tuple(chunks[1:] and chunks))


def hash_file(path: Path) -> FileHash:
    """Read a file once, for the whole and its chunks."""
    hasher = Hasher()
    with path.open("rb", buffering=0) as file:
        for block in _blocks(file.fileno(), 0, None):
            hasher.update(block)
    return hasher.finish()


def hash_files(paths: Iterable[Path]) -> list[FileHash]:
    """Several files at once, in the order given."""
    with ThreadPoolExecutor(_num_threads()) as pool:
        return list(pool.map(hash_file, paths))


def path_problem(folder: Path, name: str) -> str | None:
    """Why `name`, of a manifest, is no file to open: /etc/passwd, a/../b, or a symbolic link that
    leads out of the bundle.
    """
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or str(pure) != name or "\0" in name:
        return "it is no plain path inside the bundle"
    if not (folder / name).resolve().is_relative_to(folder.resolve()):
        return "it is a link that leads out of the bundle"
    return None


def list_files(folder: Path, below: str) -> set[str]:
    """Names, relative to `folder`, of all that lies in its subfolder `below` and is no folder."""
    return {
        path.relative_to(folder).as_posix()
        for path in (folder / below).rglob("*")
        if path.is_symlink() or not path.is_dir()
    }


def find_unreadable(path: Path) -> Path | None:
    """The first of a file or folder and all that it holds that this user may not read."""
    try:
        path.stat()
    except PermissionError:
        return path
    except OSError:
        return None  # It is absent, or a link to nothing: another matter.
    if path.is_symlink() or not path.is_dir():
        return None if os.access(path, os.R_OK) else path
    if not os.access(path, os.R_OK | os.X_OK):
        return path
    return next(filter(None, map(find_unreadable, sorted(path.iterdir()))), None)


def find_misfits(folder: Path, expected: Mapping[str, FileHash]) -> list[Fault]:
    """Files that are absent, no regular files, not inside, or of another size; reads none."""
    problems = {name: _misfit(folder, name, entry) for name, entry in sorted(expected.items())}
    return [Fault(name, problem) for name, problem in problems.items() if problem]


def _misfit(folder: Path, name: str, expected: FileHash) -> str | None:
    if problem := path_problem(folder, name):
        return problem
    path = folder / name
    if not path.is_file():
        return "it is no file" if path.exists() else "it is absent"
    size = path.stat().st_size
    if size != expected.size:
        return f"it has {size} bytes, the manifest says {expected.size}"
    return None


def find_faults(folder: Path, expected: Mapping[str, FileHash]) -> list[Fault]:
    """Files that are not what they should be; reads and hashes every one, on many threads."""
    faults = {fault.file: fault for fault in find_misfits(folder, expected)}
    parts = [
        part
        for name, entry in sorted(expected.items())
        if name not in faults
        for part in _parts(folder / name, name, entry)
    ]
    with ThreadPoolExecutor(_num_threads()) as pool:
        for fault in pool.map(_compare, parts):
            if fault:
                faults.setdefault(fault.file, fault)
    return [faults[name] for name in sorted(faults)]


@dataclass(frozen=True)
class _Part:
    """What one thread compares: `length` bytes of a file."""

    path: Path
    name: str
    offset: int
    length: int
    sha256: str


def _parts(path: Path, name: str, entry: FileHash) -> Iterator[_Part]:
    digests = entry.chunks or (entry.sha256,)
    step = CHUNK_BYTES if entry.chunks else entry.size
    for index, digest in enumerate(digests):
        offset = index * step
        yield _Part(path, name, offset, min(step, entry.size - offset), digest)


def _compare(part: _Part) -> Fault | None:
    digest = hashlib.sha256()
    try:
        with part.path.open("rb", buffering=0) as file:
            for block in _blocks(file.fileno(), part.offset, part.length):
                digest.update(block)
    except OSError as error:
        return Fault(part.name, f"it cannot be read ({error.strerror})")
    found = digest.hexdigest()
    if found == part.sha256:
        return None
    return Fault(
        part.name,
        f"sha256 of bytes {part.offset} to {part.offset + part.length} is "
        f"{found[:_SHOWN_DIGITS]}..., the manifest says {part.sha256[:_SHOWN_DIGITS]}...",
    )


def _blocks(descriptor: int, offset: int, length: int | None) -> Iterator[memoryview]:
    """`length` bytes of a file from `offset` on, or all that follow, in one buffer after another.

    Reads at its own position, so that threads do not disturb each other.
    """
    buffer = memoryview(bytearray(min(_BLOCK_BYTES, _BLOCK_BYTES if length is None else length)))
    end = None if length is None else offset + length
    while end is None or offset < end:
        wanted = len(buffer) if end is None else min(len(buffer), end - offset)
        count = os.preadv(descriptor, [buffer[:wanted]], offset)
        if count == 0:
            return
        yield buffer[:count]
        offset += count


def _num_threads() -> int:
    return min(_MAX_THREADS, len(os.sched_getaffinity(0)))
