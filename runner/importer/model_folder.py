"""Write a Hugging Face model folder: all of it or nothing, weights in files of a bounded size.

A safetensors header is made from names, shapes and dtype alone, so each weight goes to the disk as
soon as it is read. Not here: where the weights come from.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parallel.checkpoint import INDEX_FILE, SINGLE_FILE
from parallel.errors import ConfigError, PreflightError
from parallel.plan import DTYPE_BYTES
from runner.config.output_folder import check_output_folder

if TYPE_CHECKING:
    import torch

_HEADER_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def check_target(out: Path, *, source: Path, overwrite: bool) -> None:
    """Raise ConfigError unless `out` may be written.

    An existing folder may be if it is empty, or with `overwrite` if it is a model folder: then
    all of it is replaced, so a folder without config.json, or one with `source` in it, is refused.
    """
    check_output_folder(out, overwrite=overwrite, marker="config.json")
    if out.exists() and out.resolve() in source.resolve().parents:
        raise ConfigError(f"{out} holds {source}, so --overwrite does not replace it")


@contextmanager
def staged_folder(out: Path, *, num_bytes: int) -> Iterator[Path]:
    """A temporary folder beside `out` that becomes `out`, or goes away if the body raises.

    Args:
        num_bytes: what the body will write, at least.

    Raises:
        PreflightError: the disk has no room for it, or `out` cannot be made or written.
    """
    target = out.resolve()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _check_free_space(target.parent, num_bytes)
        with tempfile.TemporaryDirectory(
            prefix=f".{target.name}.partial-", dir=target.parent, ignore_cleanup_errors=True
        ) as private:
            # The temporary folder is private to this user; the one inside has the usual mode.
            staging = Path(private) / "model"
            staging.mkdir()
            yield staging
            if target.exists():
                target.rename(Path(private) / "replaced")
            staging.rename(target)
    except OSError as error:
        raise PreflightError(f"cannot write {out}: {error.strerror or error}") from error


def write_json(path: Path, contents: dict[str, Any]) -> None:
    """Write `contents` as indented UTF-8 JSON with a final newline."""
    path.write_text(json.dumps(contents, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def plan_files(sizes: dict[str, int], max_bytes: int) -> list[list[str]]:
    """Weight names for each file, in order; a weight above `max_bytes` gets a file of its own.

    >>> plan_files({"a": 3, "b": 3, "c": 9, "d": 1}, max_bytes=6)
    [['a', 'b'], ['c'], ['d']]
    """
    files: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not files or size > room:
            files.append([])
            room = max_bytes
        files[-1].append(name)
        room -= size
    return files


def write_weights(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], torch.Tensor],
    *,
    dtype: str,
    max_bytes: int,
) -> None:
    """Write the weights as model.safetensors, or as numbered files with an index.

    Holds one weight at a time, and what `read` holds while it makes the weight.

    Args:
        shapes: name -> shape, in the order in which to write the weights.
        read: gives the weight of a name, on the host, of just that shape and of `dtype`.
        dtype: of all weights: float32, bfloat16 or float16.
        max_bytes: most bytes of weights in one file, unless one weight has more.
    """
    sizes = {name: math.prod(shape) * DTYPE_BYTES[dtype] for name, shape in shapes.items()}
    plan = plan_files(sizes, max_bytes)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(plan, start=1):
        filename = f"model-{number:05d}-of-{len(plan):05d}.safetensors"
        if len(plan) == 1:
            filename = SINGLE_FILE
        _write_file(folder / filename, {name: shapes[name] for name in names}, read, dtype)
        weight_map |= dict.fromkeys(names, filename)
    if len(plan) > 1:
        total = {"total_size": sum(sizes.values())}
        write_json(folder / INDEX_FILE, {"metadata": total, "weight_map": weight_map})


def _check_free_space(folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise PreflightError(
            f"the weights take {num_bytes / 1e9:.1f} GB and the disk of {folder} has "
            f"{free / 1e9:.1f} GB free; make room or name a folder on another disk"
        )


def _write_file(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], torch.Tensor],
    dtype: str,
) -> None:
    with path.open("wb") as file:
        file.write(_file_header(shapes, dtype))
        for name in shapes:
            file.write(_contents(name, read(name), shapes[name], dtype))


def _file_header(shapes: Mapping[str, tuple[int, ...]], dtype: str) -> bytes:
    """The header of a safetensors file whose weights follow each other in the order of `shapes`.

    The length of the JSON as 8 little-endian bytes, then the JSON, with spaces to a multiple of 8.
    """
    # transformers before 5 refuses a file whose metadata does not name the format.
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, shape in shapes.items():
        end = start + math.prod(shape) * DTYPE_BYTES[dtype]
        entries[name] = {
            "dtype": _HEADER_DTYPES[dtype],
            "shape": shape,
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _contents(name: str, weight: torch.Tensor, shape: tuple[int, ...], dtype: str) -> memoryview:
    """The weight's elements in row order, little-endian as on every host that we run on."""
    import torch

    # The header is on the disk by now; any other weight would shift all that follow it.
    assert (tuple(weight.shape), weight.dtype) == (shape, getattr(torch, dtype)), name
    # numpy has no bfloat16, so the elements are seen as bytes.
    return weight.reshape(-1).view(torch.uint8).numpy().data
