"""One rank's weights in a safetensors file, written and read one tensor at a time.

The header is made from names, dtypes and shapes alone, so a tensor goes to the disk as soon as it
is there. The file says which plan and rank it belongs to. Not here: how a rank's share is cut.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from parallel.errors import ConfigError, IntegrityError, InternalError
from parallel.plan import ITEM_BYTES, RankPlan
from runner.bundle.files import FileHash, Hasher

if TYPE_CHECKING:
    import torch

# Torch's name of a dtype -> safetensors' name.
_STORED = {
    "float64": "F64",
    "float32": "F32",
    "bfloat16": "BF16",
    "float16": "F16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "complex64": "C64",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}


@dataclass(frozen=True)
class TensorHeader:
    """A tensor before it is there; `dtype` as torch calls it, such as "bfloat16"."""

    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor) -> TensorHeader:
        """
        Raises:
            ConfigError: safetensors has no such dtype.
        """
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in _STORED:
            raise ConfigError(
                f"{name} is of type {dtype}, which a bundle cannot hold; store it as one of "
                f"{', '.join(_STORED)}"
            )
        return cls(dtype, tuple(tensor.shape))

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Owner:
    """Whose weights a file holds: the digest of the plan, and the rank."""

    plan: str
    rank: int


def headers_of(rank_plan: RankPlan, dtype: str) -> dict[str, TensorHeader]:
    """What `parallel.weights.stream` yields for a rank, in its order."""
    return {tensor.name: TensorHeader(dtype, tensor.shape) for tensor in rank_plan.tensors}


def write_weights(
    path: Path,
    headers: Mapping[str, TensorHeader],
    tensors: Iterable[tuple[str, torch.Tensor]],
    owner: Owner,
) -> FileHash:
    """Write a file and hash it on the way; on the host there is one tensor at a time.

    Args:
        tensors: exactly those of `headers`, in that order, on any device.

    Raises:
        InternalError: a tensor is another one than its header says.
    """
    hasher = Hasher()
    missing = iter(headers.items())
    with path.open("wb") as file:
        data = memoryview(_header(headers, owner))
        file.write(data)
        hasher.update(data)
        for name, tensor in tensors:
            _check_tensor(name, tensor, next(missing, None))
            data = _contents(tensor)
            file.write(data)
            hasher.update(data)
            # Or this tensor would still be here while the next one is made.
            del tensor, data
    if left := next(missing, None):
        raise InternalError(f"{path}: no tensor came for {left[0]}")
    return hasher.finish()


def read_weights(file: Path, *, device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor on `device`) for every tensor of a file.

    Raises:
        IntegrityError: the file cannot be read.
    """
    try:
        with safe_open(file, framework="pt", device=str(device)) as handle:
            for name in handle.keys():  # noqa: SIM118
                yield name, handle.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise IntegrityError(f"{file}: cannot be read ({error})") from None


def read_header(file: Path) -> tuple[Owner | None, dict[str, tuple[int, ...]]]:
    """Whose weights a file says that it holds, and the shape of every tensor; needs no torch.

    Raises:
        IntegrityError: the file is truncated or corrupt.
    """
    try:
        with safe_open(file, framework="np") as handle:
            said = handle.metadata() or {}
            names = handle.keys()
            shapes = {name: tuple(handle.get_slice(name).get_shape()) for name in names}
    except (SafetensorError, OSError) as error:
        raise IntegrityError(f"{file}: truncated or corrupt ({error})") from None
    if "plan" in said and said.get("rank", "").isdecimal():
        return Owner(said["plan"], int(said["rank"])), shapes
    return None, shapes


def _header(headers: Mapping[str, TensorHeader], owner: Owner) -> bytes:
    """The length of the JSON as 8 little-endian bytes, then the JSON, with spaces to a multiple
    of 8.
    """
    metadata = {"format": "pt", "plan": owner.plan, "rank": str(owner.rank)}
    entries: dict[str, Mapping[str, str | Sequence[int]]] = {"__metadata__": metadata}
    start = 0
    for name, header in headers.items():
        stop = start + header.num_bytes
        entries[name] = {
            "dtype": _STORED[header.dtype],
            "shape": header.shape,
            "data_offsets": (start, stop),
        }
        start = stop
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _check_tensor(name: str, tensor: torch.Tensor, wanted: tuple[str, TensorHeader] | None) -> None:
    """The header is on the disk by now; any other tensor would shift all that follow it."""
    found = name, TensorHeader.of(name, tensor)
    if found != wanted:
        raise InternalError(f"weights: the header has {wanted} where {found} came")


def _contents(tensor: torch.Tensor) -> memoryview:
    """The elements in row order, little-endian as on every host that we run on."""
    import torch

    # numpy has no bfloat16, so the elements are seen as bytes.
    local = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return memoryview(local.numpy().data) if local.numel() else memoryview(b"")
