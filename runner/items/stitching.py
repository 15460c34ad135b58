"""`Stitcher`: the outputs of overlapping windows, joined into one array by a weighted average."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from parallel.errors import ConfigError, InternalError
from runner.items.spec import Array, shape_text
from runner.items.tiling import Tiling, Window


class Stitcher:
    """One output of one sample.

    It holds float32 sums, 4 bytes * (channels + 1) for each place of the padded sample; the
    channels are counted in the first output.
    """

    def __init__(self, shape: tuple[int, ...], tiling: Tiling) -> None:
        """
        Args:
            shape: the sample's spatial shape, not padded.
        """
        self._shape = shape
        self._tiling = tiling
        self._importance = tiling.importance()
        self._weights = np.zeros(tiling.padded_shape(shape), dtype=np.float32)
        self._sums: NDArray[np.float32] | None = None

    def add(self, windows: Sequence[Window], outputs: Array) -> None:
        """Take what the model made of some windows.

        Args:
            outputs: (n, C, *roi_size) for n windows; a float dtype.

        Raises:
            ConfigError: of another spatial size than the windows, or not to be averaged. It is the
                model that makes them so, for every item.
        """
        self._check(outputs)
        for window, output in zip(windows, outputs, strict=True):
            if self._sums is None:
                channels = output.shape[0]
                self._sums = np.zeros((channels, *self._weights.shape), dtype=np.float32)
            self._sums[:, *window] += output * self._importance
            self._weights[window] += self._importance

    def result(self) -> NDArray[np.float32]:
        """The average, (C, *spatial), with the padding cut off. Ends the stitching."""
        if self._sums is None or not self._weights.all():
            raise InternalError("windows of a sample were not added before its result was asked")
        self._sums /= self._weights
        pads = zip(self._shape, self._tiling.padding(self._shape), strict=True)
        inner = tuple(slice(before, before + size) for size, (before, _) in pads)
        return np.ascontiguousarray(self._sums[:, *inner])

    def _check(self, outputs: Array) -> None:
        roi = self._tiling.roi_size
        if outputs.ndim != len(roi) + 2 or outputs.shape[2:] != roi:
            raise ConfigError(
                f"an output of shape {shape_text(outputs.shape)} cannot be stitched: tiling needs "
                f"(windows, channels, {', '.join(map(str, roi))}), the size of the window; run "
                f"this model without tiling"
            )
        if outputs.dtype.kind != "f":
            raise ConfigError(
                f"an output of {outputs.dtype} cannot be averaged over windows; let the model "
                f"return scores, as a float dtype, and take labels from the result"
            )
