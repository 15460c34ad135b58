"""An open GGUF file: its metadata by key, its tensors by name, and the errors a bad file gives.

This is the one file that imports the `gguf` package. Not here: what a key or a tensor means.
"""

from __future__ import annotations

import math
import mmap
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from parallel.errors import ConfigError, IntegrityError, PreflightError
from runner.importer.gguf_header import GgufHeader, TensorEntry, parse_header

if TYPE_CHECKING:
    import numpy as np

_Value = TypeVar("_Value")


class GgufFile:
    """A GGUF file, mapped into memory: pages of it are read when a tensor is asked for.

    Attributes:
        path: the file.
        tensor_shapes: name -> shape, outermost dim first as in torch; a linear is (out, in).
        quantization: name of a ggml type -> number of tensors of that type.
    """

    def __init__(self, path: Path) -> None:
        """Open the file and check that it holds all that its header promises.

        Raises:
            PreflightError: the `gguf` package is not installed.
            IntegrityError: the file is absent, truncated, corrupt or not GGUF.
            ConfigError: a version, a byte order or a type of tensor that is not supported, or one
                part of a model that was split into several files.
        """
        self.path = path
        self._gguf = _gguf_package()
        self._data = _map_file(path)
        self._header = _parse(path, self._data)
        self._byte_shapes = {
            name: self._byte_shape(name, entry) for name, entry in self._header.tensors.items()
        }
        self.tensor_shapes = {name: entry.shape for name, entry in self._header.tensors.items()}
        types = (self._type(entry).name for entry in self._header.tensors.values())
        self.quantization = dict(Counter(types))
        if (self.get("split.count", int) or 1) > 1:
            raise ConfigError(
                f"{path} is one part of a split GGUF; join the parts first with "
                "`llama-gguf-split --merge FIRST_PART JOINED.gguf`"
            )

    def get(self, key: str, kind: type[_Value]) -> _Value | None:
        """The value at `key`, which must be of type `kind`; None where the file has no such key."""
        value = self._header.metadata.get(key)
        if value is not None and not isinstance(value, kind):
            raise IntegrityError(
                f"{self.path}: {key} is of type {type(value).__name__}, not {kind.__name__}"
            )
        return value

    def require(self, key: str, kind: type[_Value]) -> _Value:
        """The value at `key`; an IntegrityError where the file has no such key."""
        value = self.get(key, kind)
        if value is None:
            raise IntegrityError(f"{self.path}: the metadata lacks {key}")
        return value

    def dequantize(self, name: str) -> np.ndarray:
        """One tensor as float32 in a writable array of its own; the file keeps its own form.

        Raises:
            ConfigError: the `gguf` package cannot dequantise this type.
        """
        import numpy as np

        entry, byte_shape = self._header.tensors[name], self._byte_shapes[name]
        end = entry.offset + math.prod(byte_shape)
        stored = np.frombuffer(self._data[entry.offset : end], np.uint8).reshape(byte_shape)
        try:
            values = self._gguf.dequantize(stored, self._type(entry))
        except NotImplementedError as error:
            raise ConfigError(
                f"{self.path}: tensor {name} has type {self._type(entry).name}, which the "
                "installed gguf package cannot dequantise; quantise the model another way"
            ) from error
        # A float32 tensor comes back as a view of the mapped file.
        return values if values.flags.writeable else np.array(values)

    def _type(self, entry: TensorEntry) -> Any:
        return self._gguf.GGMLQuantizationType(entry.type_number)

    def _byte_shape(self, name: str, entry: TensorEntry) -> tuple[int, ...]:
        """The shape of the tensor's bytes: its last dim counts bytes instead of elements."""
        try:
            block_elements, block_bytes = self._gguf.GGML_QUANT_SIZES[self._type(entry)]
        except (ValueError, KeyError) as error:
            raise ConfigError(
                f"{self.path}: tensor {name} has type number {entry.type_number}, which the "
                "installed gguf package does not know"
            ) from error
        if not entry.shape or entry.shape[-1] % block_elements:
            raise IntegrityError(
                f"{self.path}: tensor {name} of shape {entry.shape} is not made of blocks of "
                f"{block_elements}"
            )
        byte_shape = (*entry.shape[:-1], entry.shape[-1] // block_elements * block_bytes)
        end = entry.offset + math.prod(byte_shape)
        if end > len(self._data):
            raise IntegrityError(
                f"{self.path} is cut short: tensor {name} ends at byte {end} and the file at byte "
                f"{len(self._data)}"
            )
        return byte_shape


def _gguf_package() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise PreflightError(
            "reading GGUF needs the gguf package; install it with `pip install 'shardline[import]'`"
        ) from error
    return gguf


def _map_file(path: Path) -> memoryview:
    try:
        with path.open("rb") as file:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as error:
        raise IntegrityError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise IntegrityError(f"{path} is empty") from error


def _parse(path: Path, data: memoryview) -> GgufHeader:
    try:
        return parse_header(data)
    except IntegrityError as error:
        raise IntegrityError(f"{path} is not a whole GGUF file: {error}") from error
    except ConfigError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
