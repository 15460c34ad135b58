"""`Preprocess`: how pictures and volumes become tensors, with the formulas. Data only.

Arrays (.npy, .npz) are taken as they are. Not here: the computing (`images`, `volumes`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from parallel.errors import ConfigError


@dataclass(frozen=True)
class ImagePreprocess:
    """In this order: turn upright by the EXIF tag, pick channels, resize, crop, normalize, lay out.

    value = (pixel * scale - mean) / std, in float32. A picture with transparency loses it. One of
    more than 8 bits a channel is read as "gray" only, and its pixels are not 0 to 255.

    Attributes:
        resize: the length of the shorter side, the longer one being int(resize * longer / shorter);
            or (height, width). None: the size stays.
        crop: (height, width) from the middle, starting at round((size - crop) / 2).
        interpolation: of Pillow, which averages over all that a new pixel covers.
        scale: 1/255 makes 0 to 1 of 8 bits. With 1, and no mean and std, pixels stay integers,
            which a model with an integer input needs.
        mean: one value for each channel, in the order of `channels`, in units of the scaled pixel.
        std: likewise; not 0.
        channels: "rgb" or "bgr" (three), or "gray" (one; 0.299 R + 0.587 G + 0.114 B).
        layout: "chw": (channels, height, width); "hwc": (height, width, channels).
    """

    resize: int | tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    scale: float = 1 / 255
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    channels: Literal["rgb", "bgr", "gray"] = "rgb"
    layout: Literal["chw", "hwc"] = "chw"

    def __post_init__(self) -> None:
        for name, choices in (
            ("interpolation", ("bilinear", "bicubic")),
            ("channels", ("rgb", "bgr", "gray")),
            ("layout", ("chw", "hwc")),
        ):
            _check_choice(f"image.{name}", getattr(self, name), choices)
        if isinstance(self.resize, int):
            _check_sizes("image.resize", (self.resize,), 1)
        else:
            _check_sizes("image.resize", self.resize, 2)
        _check_sizes("image.crop", self.crop, 2)
        if not math.isfinite(self.scale) or self.scale == 0:
            raise ConfigError(f"image.scale={self.scale} must be a finite number other than 0")
        self._check_per_channel("mean", self.mean)
        self._check_per_channel("std", self.std)
        if self.std is not None and 0 in self.std:
            raise ConfigError(f"image.std={self.std} must not hold 0, which values are divided by")

    @property
    def num_channels(self) -> int:
        return 1 if self.channels == "gray" else 3

    @property
    def keeps_pixels(self) -> bool:
        """Whether values are the pixels themselves."""
        return self.scale == 1 and self.mean is None and self.std is None

    def _check_per_channel(self, name: str, values: tuple[float, ...] | None) -> None:
        if values is None:
            return
        if len(values) != self.num_channels or not all(map(math.isfinite, values)):
            raise ConfigError(
                f"image.{name}={values} must hold {self.num_channels} finite numbers, one for "
                f"each channel of {self.channels!r}"
            )


@dataclass(frozen=True)
class VolumePreprocess:
    """In this order: turn to RAS, resample, window, pad or crop.

    RAS: the first axis runs from left to right, the second from back to front, the third from foot
    to head; axes are swapped and flipped, no value is changed.

    Attributes:
        spacing: in mm along each axis; the new size is round(size * old spacing / spacing), at
            least 1, so the spacing is met up to that rounding.
        resample_to: the new size (X, Y, Z), whatever the spacing. Both are trilinear: new voxel i
            has position (i + 0.5) * old / new - 0.5 in the old grid, held within it; no smoothing.
        window: (lo, hi); value = clip((value - lo) / (hi - lo), 0, 1).
        pad_or_crop_to: the size (X, Y, Z); |difference| // 2 before each axis, the rest after it,
            padded with 0.
    """

    spacing: tuple[float, float, float] | None = None
    resample_to: tuple[int, int, int] | None = None
    window: tuple[float, float] | None = None
    pad_or_crop_to: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        _check_sizes("volume.resample_to", self.resample_to, 3)
        _check_sizes("volume.pad_or_crop_to", self.pad_or_crop_to, 3)
        _check_sizes("volume.spacing", self.spacing, 3)
        if self.spacing is not None and self.resample_to is not None:
            raise ConfigError(
                "volume.spacing and volume.resample_to both set the size; give one of them"
            )
        if self.window is not None:
            low, high = self.window
            if not -math.inf < low < high < math.inf:
                raise ConfigError(f"volume.window={self.window} must be (lo, hi) with lo < hi")


@dataclass(frozen=True)
class Preprocess:
    """What is done to items that are not arrays."""

    image: ImagePreprocess = field(default_factory=ImagePreprocess)
    volume: VolumePreprocess = field(default_factory=VolumePreprocess)


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ConfigError(f"{name}={value!r} is unknown; use {' or '.join(choices)}")


def _check_sizes(name: str, sizes: Sequence[float] | None, count: int) -> None:
    if sizes is None:
        return
    if len(sizes) != count or not all(0 < size < math.inf for size in sizes):
        raise ConfigError(f"{name}={sizes} must hold {count} positive numbers")
