"""Read the text in an image with two models, a detector and a recogniser, given as callables.

Pre- and post-processing only, in numpy and Pillow, so that the same code runs on shardline and on
any other runtime. Not here: from the detector's map to boxes (`boxes`).

The shapes are fixed, as compiled models want them: one for the detector, and one for each of a few
widths of the recogniser.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from examples.ocr.boxes import Box, find_boxes

Floats = NDArray[np.float32]
Model = Callable[[Floats], Floats]
"""(n, 3, height, width) -> probabilities: (n, 1, height, width) of text for the detector, and
(n, num_steps, num_characters + 2) for the recogniser."""

PAGE_SIZE = (480, 640)
"""Height and width of what the detector sees, each a multiple of 32."""
LINE_HEIGHT = 48
LINE_WIDTHS = (160, 320, 640)
"""Widths of what the recogniser sees; a crop is padded to the next of them."""


@dataclass(frozen=True)
class Line:
    """A line of text that was read.

    Attributes:
        box: where, in pixels of the image.
        text: what it says.
        score: the mean probability of its characters, 0 to 1.
    """

    box: Box
    text: str
    score: float


def read_image(
    image: Image.Image,
    *,
    detect: Model,
    recognize: Model,
    characters: Sequence[str],
    page_size: tuple[int, int] = PAGE_SIZE,
) -> list[Line]:
    """The lines of text in an image, from top to bottom.

    The detector is called once, and the recogniser once for each width that occurs.
    """
    probabilities = detect(page_input(image, page_size)[None])
    boxes = image_boxes(probabilities[0, 0], image, page_size)
    crops = [line_input(image, box) for box in boxes]
    texts: list[tuple[str, float]] = [("", 0.0)] * len(boxes)
    for indices in same_width(crops):
        outputs = recognize(np.stack([crops[index] for index in indices]))
        for index, output in zip(indices, outputs, strict=True):
            texts[index] = decode(output, characters)
    return [Line(box, *text) for box, text in zip(boxes, texts, strict=True)]


def page_input(image: Image.Image, size: tuple[int, int] = PAGE_SIZE) -> Floats:
    """What the detector sees: (3, height, width), the image made to fit and padded with zeros.

    Raises:
        ValueError: a side that is no multiple of 32, which the detector's strides need.
    """
    if any(side <= 0 or side % 32 for side in size):
        raise ValueError(f"page size {size}: each side must be a multiple of 32, such as 480, 640")
    scale = _page_scale(image, size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    return _padded(_normalised(resized), size)


def image_boxes(
    probabilities: Floats, image: Image.Image, size: tuple[int, int] = PAGE_SIZE
) -> list[Box]:
    """The boxes of a detector's map (height, width), in pixels of the image it was made from."""
    scale = _page_scale(image, size)
    return [box.scaled(1 / scale) for box in find_boxes(probabilities)]


def line_input(image: Image.Image, box: Box, widths: Sequence[int] = LINE_WIDTHS) -> Floats:
    """What the recogniser sees of a box: (3, 48, one of `widths`), level, padded with zeros.

    A crop that is longer than the greatest width is squeezed into it.
    """
    width = min(max(widths), max(1, round(LINE_HEIGHT * box.width / box.height)))
    crop = _level(image, box).resize((width, LINE_HEIGHT), Image.Resampling.BILINEAR)
    bucket = min(w for w in widths if w >= width)
    return _padded(_normalised(crop), (LINE_HEIGHT, bucket))


def same_width(crops: Sequence[Floats]) -> list[list[int]]:
    """The indices of crops that can go into one batch."""
    groups: dict[int, list[int]] = defaultdict(list)
    for index, crop in enumerate(crops):
        groups[crop.shape[-1]].append(index)
    return list(groups.values())


def decode(probabilities: Floats, characters: Sequence[str]) -> tuple[str, float]:
    """The text of (num_steps, num_classes) by greedy CTC decoding, and the mean probability.

    Class 0 is CTC's blank; repeats without a blank between them are one character. Spaces at the
    ends are the margins of the crop, and left out.

    Raises:
        ValueError: another number of classes than the characters and the blank.
    """
    if probabilities.shape[1] != len(characters) + 1:
        raise ValueError(
            f"the recogniser has {probabilities.shape[1]} classes, but {len(characters)} "
            "characters and a blank were given; take the characters.txt of the same model"
        )
    best = probabilities.argmax(axis=1)
    kept = (best != 0) & (best != np.concatenate([[0], best[:-1]]))
    if not kept.any():
        return "", 0.0
    text = "".join(characters[index - 1] for index in best[kept])
    return text.strip(), float(probabilities.max(axis=1)[kept].mean())


def load_characters(file: Path) -> list[str]:
    """The characters of the recogniser's classes 1, 2, ...: one a line, and at last the space."""
    return [*file.read_text(encoding="utf-8").rstrip("\n").split("\n"), " "]


def _page_scale(image: Image.Image, size: tuple[int, int]) -> float:
    return min(size[0] / image.height, size[1] / image.width)


def _level(image: Image.Image, box: Box) -> Image.Image:
    """The part of the image within the box, turned level."""
    origin, right, _, below = box.corners()
    width, height = max(1, round(box.width)), max(1, round(box.height))
    along, across = (right - origin) / width, (below - origin) / height
    matrix = (along[0], across[0], origin[0], along[1], across[1], origin[1])
    return image.transform(
        (width, height), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC
    )


def _normalised(image: Image.Image) -> Floats:
    """(3, height, width) from -1 to 1, blue first: the models were trained on OpenCV's order."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)[:, :, ::-1]
    return (pixels / 127.5 - 1).transpose(2, 0, 1)


def _padded(pixels: Floats, size: tuple[int, int]) -> Floats:
    """(3, height, width) with zeros to the right and below."""
    padded = np.zeros((3, *size), dtype=np.float32)
    padded[:, : pixels.shape[1], : pixels.shape[2]] = pixels
    return padded
