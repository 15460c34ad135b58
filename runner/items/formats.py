"""The formats of results: how the outputs of one item become the bytes of a file.

Not here: where the file lies and when it is whole (`writing`).
"""

import json
import math
import zipfile
from collections.abc import Mapping, Sequence
from typing import IO, Literal, get_args

import numpy as np

from parallel.errors import ConfigError
from runner.items.item import Item
from runner.items.spec import Array, ArraySpec

Format = Literal["npy", "npz", "json"]

MAX_JSON_VALUES = 100_000
"""What a JSON result may hold, in all its outputs; a number takes about 20 bytes there."""


def check_format(chosen: str, outputs: Sequence[ArraySpec]) -> None:
    """Refuse a format that cannot hold a model's outputs.

    Raises:
        ConfigError: unknown; .npy for several outputs; or .json for large ones. A dynamic
            dimension counts as 1 here; `encode` looks again.
    """
    if chosen not in get_args(Format):
        raise ConfigError(f"format {chosen!r} is unknown; use {', '.join(get_args(Format))}")
    if chosen == "npy" and len(outputs) != 1:
        names = ", ".join(spec.name for spec in outputs)
        raise ConfigError(f"format npy holds one output, the model has {names}; use --format npz")
    if chosen == "json":
        num_values = sum(math.prod(size or 1 for size in spec.shape) for spec in outputs)
        if problem := _json_problem(num_values):
            raise ConfigError(problem)


def encode(chosen: Format, item: Item, outputs: Mapping[str, Array], stream: IO[bytes]) -> None:
    """Write the outputs of one item, without a batch dimension.

    npy: the one array. npz: arrays by output names, not compressed. json: {"item": ..., "outputs":
    {name: {"dtype": ..., "shape": [...], "data": nested lists}}}. Equal outputs make equal bytes.

    Raises:
        ItemError: too many values for JSON, or NaN or infinity, which JSON does not have.
    """
    if chosen == "npy":
        (array,) = outputs.values()
        np.lib.format.write_array(stream, array, allow_pickle=False)
    elif chosen == "npz":
        with zipfile.ZipFile(stream, "w", allowZip64=True) as archive:
            for name, array in outputs.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, array, allow_pickle=False)
    else:
        stream.write(_as_json(item, outputs).encode())


def _as_json(item: Item, outputs: Mapping[str, Array]) -> str:
    if problem := _json_problem(sum(array.size for array in outputs.values())):
        raise item.error(problem)
    described = {
        name: {"dtype": str(array.dtype), "shape": array.shape, "data": array.tolist()}
        for name, array in outputs.items()
    }
    try:
        return json.dumps({"item": item.name, "outputs": described}, allow_nan=False) + "\n"
    except ValueError as error:
        raise item.error(
            "an output has NaN or infinite values, which JSON cannot hold; use --format npz"
        ) from error


def _json_problem(num_values: int) -> str:
    if num_values <= MAX_JSON_VALUES:
        return ""
    return (
        f"the outputs of an item have {num_values} values, format json holds up to "
        f"{MAX_JSON_VALUES}; use --format npz"
    )
