"""A bundle as one file, or as parts of a size, to be carried: a plain tar, and the sha256 of each.

Weights do not compress, so nothing is compressed; the same bundle makes the same bytes. Unpacking
writes plain files and folders below the target and nothing else. Not here: what a bundle holds.
"""

from __future__ import annotations

import hashlib
import io
import shutil
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any

from parallel.errors import ConfigError, IntegrityError
from runner.bundle.durable import flush, remove, writing
from runner.bundle.files import hash_files
from runner.bundle.layout import CONTENTS, MANIFEST, REPORT, SIGNATURE

_BLOCK_BYTES = 4 * 2**20


def pack(bundle: Path, out: Path, *, part_bytes: int | None = None) -> list[Path]:
    """Write a bundle into OUT, or into OUT.000, OUT.001 and so on; OUT.sha256 lists them.

    Args:
        part_bytes: most bytes of a part; None: one file, OUT itself.

    Returns:
        The parts.

    Raises:
        ConfigError: something is there already.
        PreflightError: the disk is full, for example.
    """
    if taken := [path for path in (out, sums_of(out), _part(out, 0)) if path.exists()]:
        raise ConfigError(f"{taken[0]} is there already; remove it, or name another file")
    with writing(out):
        parts = _Parts(out, part_bytes)
        try:
            with tarfile.open(mode="w|", fileobj=parts, format=tarfile.PAX_FORMAT) as tar:
                for name in _names(bundle):
                    _add(tar, bundle / name, f"{bundle.resolve().name}/{name}")
            parts.close()
            sums_of(out).write_text(
                "".join(f"{h}  {p.name}\n" for p, h in zip(parts.paths, parts.hashes, strict=True))
            )
        except BaseException:
            for path in parts.paths:
                remove(path)
            raise
    return parts.paths


def unpack(archive: Path, out: Path, check: Callable[[Path], None] | None = None) -> None:
    """Unpack what `pack` wrote, every part checked before.

    Args:
        archive: the name that was given to `pack`.
        out: the bundle's folder, which must not be there; made at the end, when it is whole.
        check: raises what is wrong with the unpacked bundle, of which nothing is left then.

    Raises:
        IntegrityError: a part is absent or was changed, or holds what no bundle holds.
        ConfigError: `out` is there already.
        PreflightError: the disk is full, for example.
    """
    if out.exists():
        raise ConfigError(f"{out} is there already; remove it, or name another folder")
    parts = check_parts(archive)
    aside = out.with_name(f"{out.name}.unpacking")
    with writing(out):
        remove(aside)
        aside.mkdir(parents=True)
        try:
            with _joined(parts) as stream, tarfile.open(mode="r|", fileobj=stream) as tar:
                for member in tar:
                    _extract(tar, member, aside, archive)
            for path in sorted(aside.rglob("*")):
                flush(path)
            if check:
                check(aside)
            aside.rename(out)
        except tarfile.TarError as error:
            raise IntegrityError(f"{archive} is no archive of a bundle: {error}") from None
        finally:
            remove(aside)


def check_parts(archive: Path) -> list[Path]:
    """The parts of an archive in their order, every sha256 checked.

    Raises:
        IntegrityError: the list is absent or is none, or a part is absent or was changed.
    """
    listed = sums_of(archive)
    try:
        lines = listed.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise IntegrityError(
            f"{listed} cannot be read ({error}); carry it with {archive}"
        ) from None
    split = [line.partition("  ") for line in lines]
    expected = {name: sha256 for sha256, _, name in split if name}
    if not expected or any("/" in name for name in expected):
        raise IntegrityError(f"{listed} lists no parts; carry it again")
    paths = [archive.with_name(name) for name in expected]
    if missing := [path for path in paths if not path.is_file()]:
        raise IntegrityError(f"{missing[0]} is missing; carry it again")
    found = [file.sha256 for file in hash_files(paths)]
    wrong = [p for p, f, e in zip(paths, found, expected.values(), strict=True) if f != e]
    if wrong:
        raise IntegrityError(f"{wrong[0]} was changed; carry it again")
    return paths


def sums_of(archive: Path) -> Path:
    return archive.with_name(f"{archive.name}.sha256")


def _part(out: Path, index: int) -> Path:
    return out.with_name(f"{out.name}.{index:03}")


def _names(bundle: Path) -> list[str]:
    """What is carried: the manifest first, so that a reader knows at once what follows."""
    top = [name for name in (MANIFEST, SIGNATURE, REPORT) if (bundle / name).is_file()]
    below = [
        path.relative_to(bundle).as_posix()
        for folder in CONTENTS
        for path in sorted((bundle / folder).rglob("*"))
        if path.is_file()
    ]
    return top + below


def _add(tar: tarfile.TarFile, file: Path, name: str) -> None:
    """Only what a file holds counts: no owner, no time."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = file.stat().st_size, 0o644
    with file.open("rb") as data:
        tar.addfile(info, data)


def _extract(tar: tarfile.TarFile, member: tarfile.TarInfo, out: Path, archive: Path) -> None:
    pure = PurePosixPath(member.name)
    below = pure.parts[1:]
    if not member.isfile() or pure.is_absolute() or ".." in pure.parts or not below:
        raise IntegrityError(
            f"{archive} holds {member.name!r}, which no bundle holds; nothing was unpacked"
        )
    target = out.joinpath(*below)
    target.parent.mkdir(parents=True, exist_ok=True)
    data = tar.extractfile(member)
    assert data is not None, "a plain file"
    with target.open("xb") as file:
        shutil.copyfileobj(data, file, _BLOCK_BYTES)


class _Parts(io.RawIOBase):
    """What is written goes into files of at most `part_bytes`, hashed on the way."""

    def __init__(self, out: Path, part_bytes: int | None) -> None:
        self._out = out
        self._part_bytes = part_bytes
        self._file: io.BufferedWriter | None = None
        self._left = 0
        self._hash = hashlib.sha256()
        self.paths: list[Path] = []
        self.hashes: list[str] = []

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data)
        size = len(view)
        while view:
            if self._file is None or not self._left:
                self._next()
            assert self._file is not None
            chunk = view if self._part_bytes is None else view[: self._left]
            self._file.write(chunk)
            self._hash.update(chunk)
            self._left -= len(chunk)
            view = view[len(chunk) :]
        return size

    def close(self) -> None:
        self._finish()
        super().close()

    def _next(self) -> None:
        self._finish()
        path = self._out if self._part_bytes is None else _part(self._out, len(self.paths))
        self.paths.append(path)
        self._file = path.open("xb")
        self._left = self._part_bytes or 2**63
        self._hash = hashlib.sha256()

    def _finish(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
            flush(self.paths[-1])
            self.hashes.append(self._hash.hexdigest())


@contextmanager
def _joined(parts: Sequence[Path]) -> Iterator[IO[bytes]]:
    """The parts, read as one file."""
    with io.BufferedReader(_Chain(parts), _BLOCK_BYTES) as stream:
        yield stream


class _Chain(io.RawIOBase):
    def __init__(self, parts: Sequence[Path]) -> None:
        self._left = list(parts)
        self._file: io.FileIO | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            if self._file is None:
                if not self._left:
                    return 0
                self._file = io.FileIO(self._left.pop(0))
            if count := self._file.readinto(buffer):
                return count
            self._file.close()
            self._file = None
