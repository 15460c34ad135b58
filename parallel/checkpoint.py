"""The tensors of a safetensors folder, known from the file headers alone.

Checks that what the index promises is there and whole; reads no weights. `parallel.weights` reads
the slices.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from parallel.errors import IntegrityError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

LOADABLE_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
"""Bytes of an element of each dtype that can be loaded, as safetensors spells it."""


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what it is.

    Attributes:
        file: the safetensors file; the model's folder where there is none.
        dtype: as the header spells it, such as "BF16".
        shape: full, unsharded.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * LOADABLE_BYTES[self.dtype]


@dataclass(frozen=True)
class Checkpoint:
    """A folder's tensors by name.

    Attributes:
        prefix: what `with_prefix` put before the names that the files hold.
    """

    folder: Path
    tensors: Mapping[str, TensorInfo]
    prefix: str = ""

    @classmethod
    def open(cls, folder: Path) -> "Checkpoint":
        """Read the index and every file's header.

        Raises:
            IntegrityError: no checkpoint, a file that is absent, truncated or corrupt, or a tensor
                that the index promises and its file lacks.
        """
        promised = _read_index(folder)
        tensors: dict[str, TensorInfo] = {}
        for file in sorted(set(promised.values())) or [folder / SINGLE_FILE]:
            placed = [name for name, owner in promised.items() if owner == file]
            found = _read_header(file, placed)
            for name in placed:
                if name not in found:
                    raise IntegrityError(
                        f"{file}: tensor {name} is missing, though {INDEX_FILE} places it here"
                    )
            # A file may hold more than the index says; what it places elsewhere is read there.
            tensors |= {n: info for n, info in found.items() if promised.get(n, file) == file}
        return cls(folder, tensors)

    @classmethod
    def imagined(
        cls, folder: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str
    ) -> "Checkpoint":
        """Tensors of these shapes that no file holds, for a model with random weights.

        Args:
            folder: names the model in messages.
            dtype: as a header spells it, such as "BF16".
        """
        return cls(folder, {n: TensorInfo(folder, dtype, shape) for n, shape in shapes.items()})

    def with_prefix(self, prefix: str) -> "Checkpoint":
        """Names as if saved from the whole model, where the file was saved from its base model
        without `prefix`.
        """
        if not prefix or any(name.startswith(prefix) for name in self.tensors):
            return self
        renamed = {prefix + name: info for name, info in self.tensors.items()}
        return Checkpoint(self.folder, renamed, prefix)

    def stored_name(self, name: str) -> str:
        """The name under which a file holds the tensor."""
        return name.removeprefix(self.prefix)


def _read_index(folder: Path) -> dict[str, Path]:
    """Tensor name -> file, as the index says; empty where a single file has no index."""
    index = folder / INDEX_FILE
    if not index.exists():
        if not (folder / SINGLE_FILE).exists():
            raise IntegrityError(
                f"{folder}: holds neither {INDEX_FILE} nor {SINGLE_FILE}; give a folder with "
                f"safetensors weights"
            )
        return {}
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        files = {str(name): folder / str(file) for name, file in weight_map.items()}
    except OSError as error:
        raise IntegrityError(f"{index}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise IntegrityError(f"{index}: not a safetensors index; copy it again") from None
    if not files:
        raise IntegrityError(f"{index}: names no tensors; copy it again")
    for name, file in files.items():
        if not file.exists():
            raise IntegrityError(
                f"{file}: absent, though {INDEX_FILE} places {name} in it; copy it again"
            )
    return files


def _read_header(file: Path, placed: Sequence[str]) -> dict[str, TensorInfo]:
    """What a file holds; `placed` is what the index says that it does."""
    try:
        with safe_open(file, framework="np") as handle:
            slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
            return {
                name: TensorInfo(file, part.get_dtype(), tuple(part.get_shape()))
                for name, part in slices.items()
            }
    except (SafetensorError, OSError) as error:
        lost = f"; {placed[0]} and {len(placed) - 1} more tensors are in it" if placed else ""
        raise IntegrityError(
            f"{file}: truncated or corrupt ({error}); {file.stat().st_size} bytes on disk{lost}; "
            f"copy it again"
        ) from None
