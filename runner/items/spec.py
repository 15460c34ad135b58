"""`ArraySpec`: what a model declares of an input or output, as one item sees it; and the check.

Not here: the batch dimension; an item is one sample.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from parallel.errors import ConfigError
from runner.items.item import Item

Array = NDArray[np.generic]

MAX_ITEM_BYTES = 8 * 2**30
"""What one array of an item may hold once it is unpacked: a small file can claim any size."""

_DTYPES = (
    "bool",
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
    *("float16", "bfloat16", "float32", "float64"),
)


@dataclass(frozen=True)
class ArraySpec:
    """One input or output of a model, for one sample.

    Attributes:
        dtype: torch's name of it, such as "float32". NumPy has no bfloat16: such an array is
            handed on as float32, and the model's side rounds it.
        shape: without the batch dimension; None where any size will do.
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...]

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise ConfigError(
                f"{self.name}: an item cannot have dtype {self.dtype!r}; use one of "
                f"{', '.join(_DTYPES)}"
            )

    @property
    def numpy_dtype(self) -> np.dtype[np.generic]:
        return np.dtype("float32" if self.dtype == "bfloat16" else self.dtype)

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype} {shape_text(self.shape)}"


def shape_text(shape: tuple[int | None, ...]) -> str:
    """(1, *, 64) for (1, None, 64)."""
    inner = ", ".join("*" if size is None else str(size) for size in shape)
    return f"({inner},)" if len(shape) == 1 else f"({inner})"


def check_claim(
    item: Item, spec: ArraySpec, dtype: np.dtype[np.generic], shape: tuple[int, ...]
) -> None:
    """Refuse what a file's header says, before its data is read.

    Raises:
        ItemError: too large, or a dtype that `conform` never converts.
    """
    size = dtype.itemsize
    for length in shape:
        size *= length
    if size > MAX_ITEM_BYTES:
        raise item.error(
            f"{dtype} {shape_text(shape)} for {spec.name} is {size / 2**30:.1f} GiB; the limit is "
            f"{MAX_ITEM_BYTES // 2**30} GiB"
        )
    if dtype.kind not in "biuf":
        raise item.error(
            f"{dtype} cannot become {spec.dtype} for {spec.name}; store real numbers or bool"
        )


def conform(item: Item, spec: ArraySpec, values: Array) -> Array:
    """The values as the model declares them.

    Converted are: bool to any number; integers to floats, and to integers that hold them; floats
    to floats, wider or narrower. Not converted are: floats to integers, anything to bool, complex
    numbers, text, objects; and a finite value that would become infinite.

    Returns:
        C-contiguous, of the spec's dtype and shape.

    Raises:
        ItemError: another shape, no values, nothing but NaN, or a dtype that is not converted.
    """
    matches = len(values.shape) == len(spec.shape) and all(
        wanted in (None, size) for wanted, size in zip(spec.shape, values.shape, strict=True)
    )
    if not matches:
        raise item.error(
            f"{spec.name} has shape {shape_text(values.shape)}, the model takes "
            f"{shape_text(spec.shape)} (one sample, no batch dimension)"
        )
    if values.size == 0:
        raise item.error(f"{spec.name} has shape {shape_text(values.shape)}: it is empty")
    if values.dtype.kind == "f" and np.isnan(values).all():
        raise item.error(f"{spec.name} holds nothing but NaN")
    return np.ascontiguousarray(_convert(item, spec, values))


def _convert(item: Item, spec: ArraySpec, values: Array) -> Array:
    source, target = values.dtype, spec.numpy_dtype
    if source == target:
        return values
    if target.kind == "f" and source.kind in "biuf":
        return _to_float(item, spec, values)
    if target.kind in "iu" and source.kind in "biu":
        limits = np.iinfo(str(target))
        low, high = int(values.min()), int(values.max())
        if low < limits.min or high > limits.max:
            raise item.error(f"{spec.name} has values {low} to {high}, beyond {spec.dtype}")
        return values.astype(target)
    raise item.error(
        f"{spec.name} is {source}, which is not converted to the model's {spec.dtype}; store it "
        f"as {spec.dtype}"
    )


def _to_float(item: Item, spec: ArraySpec, values: Array) -> Array:
    with np.errstate(over="ignore"):
        converted = values.astype(spec.numpy_dtype)
    if np.count_nonzero(np.isinf(converted)) > np.count_nonzero(np.isinf(values)):
        raise item.error(f"{spec.name} has values beyond {spec.dtype}; scale them, or store less")
    return converted
