"""Sliding windows over pictures and volumes that are larger than a model's input.

Names, window positions and weights are those of MONAI's `sliding_window_inference`. Not here: the
joining of what the model makes of the windows (`stitching`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from parallel.errors import ConfigError
from runner.items.spec import Array

Window = tuple[slice, ...]
"""One slice for each spatial dimension of the padded sample."""

_PADDING = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}
_MIN_WEIGHT = 1e-3


@dataclass(frozen=True)
class Tiling:
    """How a sample (C, *spatial) is covered with windows of one size.

    Attributes:
        roi_size: the window, one size for each spatial dimension; the model's input.
        overlap: the part of a window that its neighbour covers too, 0 to below 1.
        sw_batch_size: windows that one batch holds.
        mode: windows count the same ("constant"), or less towards their edges ("gaussian").
        sigma_scale: the Gaussian's sigma along a dimension is sigma_scale * roi_size.
        padding_mode: with what a sample smaller than the window is padded: "constant", "reflect",
            "replicate" or "circular".
        cval: the value of "constant" padding.
    """

    roi_size: tuple[int, ...]
    overlap: float = 0.25
    sw_batch_size: int = 1
    mode: Literal["constant", "gaussian"] = "constant"
    sigma_scale: float = 0.125
    padding_mode: Literal["constant", "reflect", "replicate", "circular"] = "constant"
    cval: float = 0.0

    def __post_init__(self) -> None:
        for name, valid, rule in (
            ("roi_size", bool(self.roi_size) and min(self.roi_size) > 0, "positive sizes"),
            ("overlap", 0 <= self.overlap < 1, "at least 0 and less than 1"),
            ("sw_batch_size", self.sw_batch_size > 0, "at least 1"),
            ("mode", self.mode in ("constant", "gaussian"), "constant or gaussian"),
            ("sigma_scale", self.sigma_scale > 0, "more than 0"),
            ("padding_mode", self.padding_mode in _PADDING, f"one of {', '.join(_PADDING)}"),
        ):
            if not valid:
                raise ConfigError(f"tiling.{name}={getattr(self, name)!r} must be {rule}")

    def padding(self, shape: tuple[int, ...]) -> list[tuple[int, int]]:
        """What is added before and after each spatial dimension: half of what is missing, the odd
        one after.

        Args:
            shape: the sample's spatial shape.

        Raises:
            ConfigError: of another number of dimensions than roi_size.
        """
        if len(shape) != len(self.roi_size):
            raise ConfigError(
                f"tiling.roi_size={self.roi_size} has {len(self.roi_size)} dimensions, the input "
                f"has {len(shape)} besides its channels; give one size for each"
            )
        missing = [max(0, roi - size) for roi, size in zip(self.roi_size, shape, strict=True)]
        return [(total // 2, total - total // 2) for total in missing]

    def padded_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The spatial shape that the windows cover."""
        pads = zip(shape, self.padding(shape), strict=True)
        return tuple(size + before + after for size, (before, after) in pads)

    def windows(self, shape: tuple[int, ...]) -> list[Window]:
        """Where the windows lie in a padded sample, the last dimension varying fastest.

        They start int(roi * (1 - overlap)) apart, at least 1, and the last one ends at the border.

        Args:
            shape: the sample's spatial shape, not padded.
        """
        starts = [
            _starts(size, roi, self.overlap)
            for size, roi in zip(self.padded_shape(shape), self.roi_size, strict=True)
        ]
        return [
            tuple(slice(at, at + roi) for at, roi in zip(corner, self.roi_size, strict=True))
            for corner in product(*starts)
        ]

    def batches(self, sample: Array) -> Iterator[tuple[list[Window], Array]]:
        """The windows of a sample and what it holds there, in batches.

        Args:
            sample: (C, *spatial).

        Yields:
            n windows and an array (n, C, *roi_size); n = sw_batch_size, or less at the end.
        """
        shape = sample.shape[1:]
        padded = self._padded(sample)
        windows = self.windows(shape)
        for first in range(0, len(windows), self.sw_batch_size):
            some = windows[first : first + self.sw_batch_size]
            yield some, np.stack([padded[:, *window] for window in some])

    def importance(self) -> NDArray[np.float32]:
        """The weight of each place of a window, of shape roi_size.

        Gaussian: the product over the dimensions of exp(-x^2 / (2 sigma^2)), x the distance from
        the window's middle, and no less than 1e-3 or the least of them, whichever is more.
        """
        weights = np.ones((), dtype=np.float32)
        for roi in self.roi_size:
            weights = weights[..., None] * self._profile(roi)
        return np.maximum(weights, np.float32(_MIN_WEIGHT))

    def _profile(self, roi: int) -> NDArray[np.float32]:
        if self.mode == "constant":
            return np.ones(roi, dtype=np.float32)
        distance = np.arange(roi) - (roi - 1) / 2
        profile = np.exp(-(distance**2) / (2 * (self.sigma_scale * roi) ** 2))
        return np.asarray(profile, dtype=np.float32)

    def _padded(self, sample: Array) -> Array:
        pads = [(0, 0), *self.padding(sample.shape[1:])]
        if not any(map(any, pads)):
            return sample
        # NumPy's types know each mode as a literal, and "constant" alone has a value.
        how = {"constant_values": self.cval} if self.padding_mode == "constant" else {}
        padded: Array = np.pad(sample, pads, _PADDING[self.padding_mode], **how)  # type: ignore[call-overload]
        return padded


def _starts(size: int, roi: int, overlap: float) -> list[int]:
    interval = max(1, int(roi * (1 - overlap)))
    return [*range(0, size - roi, interval), size - roi]
