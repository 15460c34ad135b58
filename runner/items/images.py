"""Pictures, by Pillow. The formulas are those of `ImagePreprocess`."""

from typing import TYPE_CHECKING

import numpy as np

from runner.items.extras import import_extra
from runner.items.item import Item
from runner.items.preprocess import ImagePreprocess
from runner.items.spec import Array

if TYPE_CHECKING:
    from PIL.Image import Image


def read_image(item: Item, how: ImagePreprocess) -> Array:
    """One picture.

    Returns:
        Of the layout asked for, float32; or the pixels as uint8, where `how` keeps them.

    Raises:
        ItemError: several frames, more than 8 bits a channel in colour, or smaller than the crop.
    """
    pillow = import_extra("image")
    # It refuses what claims to be a decompression bomb: more than twice its MAX_IMAGE_PIXELS.
    with pillow.open(item.path) as image:
        frames = getattr(image, "n_frames", 1)
        if frames != 1:
            raise item.error(f"it holds {frames} pictures; give each a file of its own")
        image.load()
        pixels = _pixels(item, how, image)
    return _lay_out(_normalized(pixels, how), how)


def _pixels(item: Item, how: ImagePreprocess, image: "Image") -> Array:
    """(height, width, channels) in the order of `how.channels`; uint8, or float32 if deeper."""
    from PIL.ImageOps import exif_transpose

    upright = _with_channels(item, how, exif_transpose(image))
    cropped = _cropped(item, how, _resized(how, upright))
    pixels: Array = np.atleast_3d(np.asarray(cropped))
    return pixels[..., ::-1] if how.channels == "bgr" else pixels


def _with_channels(item: Item, how: ImagePreprocess, image: "Image") -> "Image":
    pillow = import_extra("image")
    deep = image.mode in ("I", "F") or image.mode.startswith("I;")
    if deep and how.channels != "gray":
        raise item.error(
            f"its pixels have more than 8 bits (mode {image.mode}), which are read as "
            f"image.channels gray only, not {how.channels}"
        )
    if deep:
        # By way of an array: Pillow's own conversions cut some of these modes off at 255.
        wide: Image = pillow.fromarray(np.asarray(image).astype(np.float32))
        return wide
    return image.convert("L" if how.channels == "gray" else "RGB")


def _resized(how: ImagePreprocess, image: "Image") -> "Image":
    if how.resize is None:
        return image
    if isinstance(how.resize, int):
        shorter, longer = sorted(image.size)
        far = int(how.resize * longer / shorter)
        size = (how.resize, far) if image.width <= image.height else (far, how.resize)
    else:
        size = (how.resize[1], how.resize[0])
    resampling = import_extra("image").Resampling
    filters = {"bilinear": resampling.BILINEAR, "bicubic": resampling.BICUBIC}
    return image.resize(size, filters[how.interpolation])


def _cropped(item: Item, how: ImagePreprocess, image: "Image") -> "Image":
    if how.crop is None:
        return image
    height, width = how.crop
    if image.height < height or image.width < width:
        raise item.error(
            f"it is {image.height} x {image.width} (height x width), smaller than image.crop "
            f"{height} x {width}; set image.resize"
        )
    top, left = round((image.height - height) / 2), round((image.width - width) / 2)
    return image.crop((left, top, left + width, top + height))


def _normalized(pixels: Array, how: ImagePreprocess) -> Array:
    if how.keeps_pixels:
        return pixels
    values = pixels.astype(np.float32) * np.float32(how.scale)
    if how.mean is not None:
        values -= np.array(how.mean, dtype=np.float32)
    if how.std is not None:
        values /= np.array(how.std, dtype=np.float32)
    return values


def _lay_out(values: Array, how: ImagePreprocess) -> Array:
    return values.transpose(2, 0, 1) if how.layout == "chw" else values
