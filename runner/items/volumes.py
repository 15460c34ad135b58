"""Volumes, by nibabel. The formulas are those of `VolumePreprocess`."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from runner.items.extras import import_extra
from runner.items.item import Item
from runner.items.preprocess import VolumePreprocess
from runner.items.spec import Array, ArraySpec, check_claim


def read_volume(item: Item, spec: ArraySpec, how: VolumePreprocess) -> Array:
    """One volume, in RAS orientation, with the file's own scaling of values applied.

    Returns:
        (1, X, Y, Z); (C, X, Y, Z) of a file with a fourth dimension; or (X, Y, Z), if the spec has
        three dimensions. Floats that hold the file's values; or what the file has, where the
        model takes integers.

    Raises:
        ItemError: not 3 or 4 dimensions, or too large.
    """
    # nibabel types most of what it returns as its abstract base class.
    # Not mapped: the array outlives the reading, and the file need not.
    image: Any = import_extra("volume").load(item.path, mmap=False)
    if image.ndim not in (3, 4):
        raise item.error(f"it has {image.ndim} dimensions; a volume has 3, or 4 with channels last")
    check_claim(item, spec, image.get_data_dtype(), image.shape)
    values, spacing = _in_ras(image, as_float=spec.numpy_dtype.kind == "f")
    values = _resampled(values, spacing, how)
    values = _windowed(values, how)
    values = _padded_or_cropped(values, how)
    return values[0] if len(spec.shape) == 3 and values.shape[0] == 1 else values


def _in_ras(image: Any, *, as_float: bool) -> tuple[Array, tuple[float, ...]]:
    """Values as (C, X, Y, Z), and the spacing in mm."""
    canonical = import_extra("volume").as_closest_canonical(image)
    if as_float:
        wide = np.promote_types(image.get_data_dtype(), np.float32)
        values: Array = canonical.get_fdata(dtype=wide, caching="unchanged")
    else:
        values = np.asanyarray(canonical.dataobj)
    channels_first = values[None] if values.ndim == 3 else np.moveaxis(values, -1, 0)
    return channels_first, canonical.header.get_zooms()[:3]


def _resampled(values: Array, spacing: tuple[float, ...], how: VolumePreprocess) -> Array:
    sizes = how.resample_to
    if how.spacing is not None:
        old = zip(values.shape[1:], spacing, how.spacing, strict=True)
        sizes = tuple(max(1, round(size * float(was) / new)) for size, was, new in old)
    if sizes is None:
        return values
    resampled = values.astype(np.float32)
    for axis, size in enumerate(sizes, start=1):
        resampled = resample_axis(resampled, axis, size)
    return resampled


def resample_axis(values: NDArray[np.float32], axis: int, size: int) -> NDArray[np.float32]:
    """Linear interpolation along one axis; one after the other they are trilinear."""
    old = values.shape[axis]
    if old == size:
        return values
    position = np.clip((np.arange(size) + 0.5) * (old / size) - 0.5, 0, old - 1)
    before = position.astype(np.intp)
    after = np.minimum(before + 1, old - 1)
    along = [1] * values.ndim
    along[axis] = size
    fraction = (position - before).astype(np.float32).reshape(along)
    low = values.take(before, axis)
    result: NDArray[np.float32] = values.take(after, axis)
    result -= low
    result *= fraction
    result += low
    return result


def _windowed(values: Array, how: VolumePreprocess) -> Array:
    if how.window is None:
        return values
    low, high = how.window
    scaled = (values.astype(np.float32) - np.float32(low)) / np.float32(high - low)
    return np.clip(scaled, 0, 1, out=scaled)


def _padded_or_cropped(values: Array, how: VolumePreprocess) -> Array:
    if how.pad_or_crop_to is None:
        return values
    pads = [(0, 0)]
    cuts = [slice(None)]
    for size, wanted in zip(values.shape[1:], how.pad_or_crop_to, strict=True):
        missing, surplus = max(0, wanted - size), max(0, size - wanted)
        pads.append((missing // 2, missing - missing // 2))
        cuts.append(slice(surplus // 2, surplus // 2 + min(size, wanted)))
    return np.pad(values[tuple(cuts)], pads)
