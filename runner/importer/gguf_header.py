"""Parse the header of a GGUF file, version 2 or 3: metadata, and where each tensor lies.

Written here because the reader of the `gguf` package takes lengths on trust: a damaged one makes
it allocate without end. Not here: the tensors' contents.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from parallel.errors import ConfigError, IntegrityError

_MAGIC = b"GGUF"
_DEFAULT_ALIGNMENT = 32
_MAX_DIMS = 4

_STRING = 8
_ARRAY = 9
# GGUF's number for a type of value -> struct's letter.
_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_FLOAT32 = 6


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies, as the header says; nothing of it is checked against the file."""

    shape: tuple[int, ...]
    """Outermost dim first, as in torch; GGUF writes it the other way round."""
    type_number: int
    """ggml's number of its type."""
    offset: int
    """Bytes from the start of the file."""


@dataclass(frozen=True)
class GgufHeader:
    """All that stands before the data of a GGUF file."""

    metadata: dict[str, Any]
    tensors: dict[str, TensorEntry]


def parse_header(data: bytes | memoryview) -> GgufHeader:
    """Parse the header at the start of `data`, the bytes of the whole file.

    Raises:
        IntegrityError: the bytes end too early, or are not a GGUF header.
        ConfigError: big-endian, or a version other than 2 and 3.
    """
    cursor = _Cursor(data)
    if cursor.take(len(_MAGIC)) != _MAGIC:
        raise IntegrityError("it does not start with 'GGUF'")
    version = cursor.number("I")
    if version not in (2, 3):
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        what = "big-endian" if swapped in (2, 3) else f"GGUF version {version}"
        raise ConfigError(f"it is {what}; little-endian files of version 2 and 3 are supported")
    num_tensors, num_keys = cursor.number("Q"), cursor.number("Q")
    metadata = _unique(_entries(cursor, num_keys), "key")
    tensors = _unique(_tensor_entries(cursor, num_tensors), "tensor")
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise IntegrityError(f"general.alignment is {alignment!r}")
    start = -(-cursor.position // alignment) * alignment
    return GgufHeader(
        metadata,
        {
            name: TensorEntry(shape, type_number, start + offset)
            for name, (shape, type_number, offset) in tensors.items()
        },
    )


class _Cursor:
    """Reads values one after another, and refuses to read past the end."""

    def __init__(self, data: bytes | memoryview) -> None:
        self._data = data
        self.position = 0

    def take(self, num_bytes: int) -> bytes:
        end = self.position + num_bytes
        if end > len(self._data):
            raise IntegrityError(
                f"its header goes on to byte {end} or further, and the file ends at byte "
                f"{len(self._data)}"
            )
        taken = bytes(self._data[self.position : end])
        self.position = end
        return taken

    def numbers(self, letter: str, count: int) -> list[Any]:
        taken = self.take(count * struct.calcsize(f"<{letter}"))
        return list(struct.unpack(f"<{count}{letter}", taken))

    def number(self, letter: str) -> Any:
        return self.numbers(letter, 1)[0]

    def string(self) -> str:
        position = self.position
        try:
            return self.take(self.number("Q")).decode()
        except UnicodeDecodeError as error:
            raise IntegrityError(f"the text at byte {position} is not UTF-8") from error

    def value(self) -> Any:
        return self._array() if (kind := self.number("I")) == _ARRAY else self._single(kind)

    def _single(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind not in _SCALARS:
            raise IntegrityError(f"byte {self.position - 4} names value type {kind}")
        value = self.number(_SCALARS[kind])
        return _shortest(value) if kind == _FLOAT32 else value

    def _array(self) -> list[Any]:
        kind, count = self.number("I"), self.number("Q")
        if kind == _STRING:
            return [self.string() for _ in range(count)]
        if kind not in _SCALARS:
            raise IntegrityError(f"byte {self.position - 12} names array type {kind}")
        return self.numbers(_SCALARS[kind], count)


def _entries(cursor: _Cursor, count: int) -> Iterator[tuple[str, Any]]:
    for _ in range(count):
        yield cursor.string(), cursor.value()


def _tensor_entries(
    cursor: _Cursor, count: int
) -> Iterator[tuple[str, tuple[tuple[int, ...], int, int]]]:
    for _ in range(count):
        name, num_dims = cursor.string(), cursor.number("I")
        if num_dims > _MAX_DIMS:
            raise IntegrityError(f"tensor {name!r} has {num_dims} dims")
        shape = tuple(reversed(cursor.numbers("Q", num_dims)))
        yield name, (shape, cursor.number("I"), cursor.number("Q"))


def _unique(entries: Iterator[tuple[str, Any]], what: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in entries:
        if name in found:
            raise IntegrityError(f"{what} {name!r} stands there twice")
        found[name] = value
    return found


def _shortest(value: float) -> float:
    """The shortest decimal that gives a float32: 1e-05, not 9.999999747378752e-06."""
    import numpy as np

    return float(str(np.float32(value)))
