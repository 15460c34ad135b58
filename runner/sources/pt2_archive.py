"""The members of a .pt2 file: a zip archive with everything below one folder.

Raw tensors are mapped, not read. Not here: what a member means.
"""

import mmap
import struct
import zipfile
from pathlib import Path

import torch

from parallel.errors import IntegrityError

_LOCAL_HEADER = struct.Struct("<4s22xHH")
_LOCAL_MAGIC = b"PK\x03\x04"


class Pt2Archive:
    """A .pt2 file, its members named without the folder they lie in.

    Raises:
        IntegrityError: no zip archive, a truncated one, or one with members that contradict each
            other.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._map: mmap.mmap | None = None
        if not path.is_file():
            raise IntegrityError(f"{path}: no such file")
        try:
            with zipfile.ZipFile(path) as archive:
                infos = archive.infolist()
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            raise IntegrityError(f"{path}: no .pt2 file, or a truncated one ({error})") from None
        self._members = {info.filename.partition("/")[2]: info for info in infos}
        roots = {info.filename.partition("/")[0] for info in infos}
        if len(roots) != 1 or len(self._members) != len(infos) or "" in self._members:
            raise IntegrityError(
                f"{path}: no .pt2 file of this torch (its members are not in one folder); if it "
                "was saved by torch before 2.8, load it there and save it again with 2.13"
            )

    def names(self) -> list[str]:
        return list(self._members)

    def read(self, name: str) -> bytes:
        """A member's bytes, compared with their CRC."""
        info = self._member(name)
        try:
            with zipfile.ZipFile(self.path) as archive:
                return archive.read(info)
        except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError) as error:
            raise self.fault(name, f"truncated or corrupt ({error})") from None

    def size(self, name: str) -> int:
        return self._member(name).file_size

    def map(self, name: str) -> torch.Tensor:
        """A member's bytes as a tensor of uint8 that is mapped from the file, private to us."""
        info = self._member(name)
        if info.compress_type != zipfile.ZIP_STORED:
            raise self.fault(name, "it is compressed; tensors of a .pt2 are stored as they are")
        with self.path.open("rb") as file:
            file.seek(info.header_offset)
            header = file.read(_LOCAL_HEADER.size)
        if len(header) < _LOCAL_HEADER.size or not header.startswith(_LOCAL_MAGIC):
            raise self.fault(name, "truncated or corrupt")
        _, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(header)
        start = info.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes
        if info.file_size == 0:
            return torch.empty(0, dtype=torch.uint8)
        if start + info.file_size > len(self._mapped()):
            raise self.fault(name, "truncated")
        # A storage of its own: what is later written of a tensor is its whole storage.
        return torch.frombuffer(
            self._mapped(), dtype=torch.uint8, offset=start, count=info.file_size
        )

    def _mapped(self) -> mmap.mmap:
        if self._map is None:
            with self.path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return self._map

    def fault(self, name: str, problem: str) -> IntegrityError:
        return IntegrityError(f"{self.path}: member {name}: {problem}")

    def _member(self, name: str) -> zipfile.ZipInfo:
        if name not in self._members:
            raise self.fault(name, "absent")
        return self._members[name]
