""".npy and .npz files: headers are checked before the data is read, and nothing is unpickled."""

import zipfile
from collections.abc import Sequence
from typing import IO

import numpy as np

from runner.items.item import Item
from runner.items.spec import Array, ArraySpec, check_claim, conform


def read_array(item: Item, spec: ArraySpec) -> Array:
    """The array of a .npy file."""
    with item.path.open("rb") as stream:
        return conform(item, spec, _read(item, spec, stream))


def read_archive(item: Item, specs: Sequence[ArraySpec]) -> dict[str, Array]:
    """The arrays of a .npz file by the inputs' names; what else it holds is not looked at.

    Raises:
        ItemError: an input is not in it.
    """
    with zipfile.ZipFile(item.path) as archive:
        held = [name.removesuffix(".npy") for name in archive.namelist()]
        missing = [spec.name for spec in specs if spec.name not in held]
        if missing:
            raise item.error(
                f"it holds {', '.join(held) or 'nothing'}; the model's input {missing[0]} is absent"
            )
        arrays = {}
        for spec in specs:
            with archive.open(f"{spec.name}.npy") as stream:
                arrays[spec.name] = conform(item, spec, _read(item, spec, stream))
        return arrays


def _read(item: Item, spec: ArraySpec, stream: IO[bytes]) -> Array:
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    elif version == (2, 0):
        shape, _, dtype = np.lib.format.read_array_header_2_0(stream)
    else:
        raise item.error(f"format version {version} of {spec.name} is not read; use 1.0 or 2.0")
    check_claim(item, spec, dtype, shape)
    stream.seek(0)
    array: Array = np.lib.format.read_array(stream, allow_pickle=False)
    return array
