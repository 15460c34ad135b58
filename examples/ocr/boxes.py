"""From a detector's probability map to boxes around lines of text.

The post-processing of Liao et al., "Real-time Scene Text Detection with Differentiable
Binarization" (2020): threshold, connected regions, the smallest rectangle around each, grown back
to the size that training had shrunk it from. Not here: images and models (`ocr`).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import ConvexHull  # type: ignore[import-untyped]
from skimage.measure import label, regionprops
from skimage.morphology import dilation

Array = NDArray[np.float64]

THRESHOLD = 0.3
MIN_SCORE = 0.5
UNCLIP_RATIO = 2.0
"""1.6 crops so close that the recogniser misses spaces between words."""
MIN_SIDE = 3
"""In pixels of the map; a region that is thinner is noise."""


@dataclass(frozen=True)
class Box:
    """A rectangle around a line of text, in pixels.

    Attributes:
        x, y: its centre.
        width: its side along the text.
        height: its side across the text.
        angle: of the text in radians, from -pi/4 to pi/4; above 0 where the text falls.
        score: the mean probability of text in the region, 0 to 1.
    """

    x: float
    y: float
    width: float
    height: float
    angle: float
    score: float

    def scaled(self, factor: float) -> "Box":
        """The same box in an image `factor` times as large."""
        x, y, width, height = (factor * v for v in (self.x, self.y, self.width, self.height))
        return Box(x, y, width, height, self.angle, self.score)

    def corners(self) -> Array:
        """(4, 2): x and y of top left, top right, bottom right and bottom left."""
        cos, sin = np.cos(self.angle), np.sin(self.angle)
        along = np.array([cos, sin]) * self.width / 2
        across = np.array([-sin, cos]) * self.height / 2
        centre = np.array([self.x, self.y])
        signs = ((-1, -1), (1, -1), (1, 1), (-1, 1))
        return np.stack([centre + a * along + b * across for a, b in signs])


def find_boxes(
    probabilities: NDArray[np.float32],
    *,
    threshold: float = THRESHOLD,
    min_score: float = MIN_SCORE,
    unclip_ratio: float = UNCLIP_RATIO,
) -> list[Box]:
    """The boxes in a map (height, width) of probabilities, from top to bottom.

    Args:
        threshold: a pixel above it is text.
        min_score: a region whose mean probability is lower is dropped.
        unclip_ratio: a box grows on each side by its area times this over its perimeter.
    """
    mask = dilation(probabilities > threshold, np.ones((2, 2), dtype=bool))
    boxes = []
    labels = label(mask, connectivity=2)  # type: ignore[no-untyped-call]
    for region in regionprops(labels, probabilities):  # type: ignore[no-untyped-call]
        box = smallest_box(region.coords[:, ::-1], score=float(region.intensity_mean))
        if box.score >= min_score and min(box.width, box.height) >= MIN_SIDE:
            boxes.append(_unclip(box, unclip_ratio))
    return sorted(boxes, key=lambda box: (box.y, box.x))


def smallest_box(pixels: NDArray[np.int64], *, score: float) -> Box:
    """The rectangle of least area around pixels (num_pixels, 2) of x and y.

    One of its sides lies along a side of the convex hull, so each of those is tried.
    """
    corners = (pixels[:, None] + np.array([[0, 0], [0, 1], [1, 0], [1, 1]])).reshape(-1, 2)
    hull = corners[ConvexHull(corners).vertices].astype(np.float64)
    sides = np.roll(hull, -1, axis=0) - hull
    quarter = np.pi / 2
    # A rectangle is the same after a quarter turn; text is taken to be nearer level than upright.
    angles = (np.arctan2(sides[:, 1], sides[:, 0]) + quarter / 2) % quarter - quarter / 2
    return min(
        (_box_at(hull, float(angle), score) for angle in np.unique(angles.round(6))),
        key=lambda box: box.width * box.height,
    )


def _box_at(points: Array, angle: float, score: float) -> Box:
    """The rectangle around points (num_points, 2) with sides along and across `angle`."""
    cos, sin = np.cos(angle), np.sin(angle)
    turned = points @ np.array([[cos, -sin], [sin, cos]])
    low, high = turned.min(axis=0), turned.max(axis=0)
    along, across = (low + high) / 2
    width, height = (high - low).tolist()
    x, y = float(cos * along - sin * across), float(sin * along + cos * across)
    return Box(x, y, width, height, angle, score)


def _unclip(box: Box, ratio: float) -> Box:
    distance = box.width * box.height * ratio / (2 * (box.width + box.height))
    width, height = box.width + 2 * distance, box.height + 2 * distance
    return Box(box.x, box.y, width, height, box.angle, box.score)
