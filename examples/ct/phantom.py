"""A chest phantom: what a CT of a body with lungs, vessels and nodules measures, in Hounsfield.

Coordinates are millimetres from the middle of the volume: x to the right of the body, y to its
front, z to its head. Everything depends on the seed alone. Not here: files (`make_volume`).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

Volume = NDArray[np.float32]
Place = NDArray[np.float64]

FIELD_MM = (380.0, 300.0, 320.0)
"""What a volume covers, whatever its size in voxels."""

AIR, FAT, MUSCLE, BLOOD, LUNG, MARROW, BONE = -1000, -100, 50, 160, -860, 180, 500
NOISE_HU = 25.0


@dataclass(frozen=True)
class Ellipsoid:
    """Where something is, in millimetres."""

    center: tuple[float, float, float]
    radii: tuple[float, float, float]

    def depth(self, x: Volume | np.float32, y: Volume | np.float32, z: np.float32) -> Volume:
        """1 in the middle, 0 on the surface, below 0 outside; in the shape of x and y together."""
        (cx, cy, cz), (rx, ry, rz) = self.center, self.radii
        depth = 1 - ((x - cx) / rx) ** 2 - ((y - cy) / ry) ** 2 - ((z - cz) / rz) ** 2
        return np.asarray(depth, np.float32)


@dataclass(frozen=True)
class Ball:
    """A nodule, or a piece of a vessel."""

    center: Place
    radius_mm: float
    hu: float


SKIN = Ellipsoid((0, 0, 0), (172, 122, 600))
FLESH = Ellipsoid((0, 2, 0), (156, 106, 560))
RIB_CAGE = Ellipsoid((0, 4, 0), (148, 98, 480))
LUNGS = (Ellipsoid((72, 4, 10), (56, 80, 125)), Ellipsoid((-74, 4, 12), (54, 78, 125)))
HEART = Ellipsoid((-22, 28, -40), (56, 46, 58))
TRACHEA = Ellipsoid((0, -4, 120), (9, 9, 110))
AORTA = Ellipsoid((-24, -48, 0), (13, 13, 900))
SPINE = Ellipsoid((0, -76, 0), (21, 20, 900))
TABLE_Y_MM = (-142.0, -134.0)
TABLE_HU = -500


def make_phantom(size: tuple[int, int, int], seed: int) -> NDArray[np.int16]:
    """A chest like no other seed's.

    Args:
        size: voxels along x, y and z.

    Returns:
        size, int16, Hounsfield units from -1024 up.
    """
    chance = np.random.default_rng(seed)
    spacing = np.array(FIELD_MM) / size
    axes = [(np.arange(n) - (n - 1) / 2) * step for n, step in zip(size, spacing, strict=True)]
    x, y, z = (axis.astype(np.float32) for axis in axes)
    volume = np.empty(size, np.float32)
    for index, height in enumerate(z):
        volume[:, :, index] = _slice_at(x[:, None], y[None, :], height)
    for ball in [*_vessels(chance), *_nodules(chance)]:
        _paint(volume, ball, axes, spacing)
    for index in range(size[2]):
        volume[:, :, index] += _noise(chance, size[:2])
    return np.clip(np.rint(volume), -1024, 3071).astype(np.int16)


def _slice_at(x: Volume, y: Volume, z: np.float32) -> Volume:
    """What is at a height, without vessels in the lungs: (num_x, num_y)."""
    hu = np.full(np.broadcast_shapes(x.shape, y.shape), AIR, np.float32)
    hu[np.broadcast_to((y > TABLE_Y_MM[0]) & (y < TABLE_Y_MM[1]), hu.shape)] = TABLE_HU
    hu[SKIN.depth(x, y, z) > 0] = FAT
    flesh = FLESH.depth(x, y, z) > 0
    hu[flesh] = MUSCLE
    # Ribs fall towards the front, hence bands that depend on y too.
    in_band = np.sin(2 * np.pi * (z + 0.35 * y) / 27) > 0.35
    hu[flesh & (RIB_CAGE.depth(x, y, z) < 0) & in_band] = BONE
    for lung in LUNGS:
        inside = lung.depth(x, y, z) > 0
        # A patient lies on the back, where the lung is pressed together.
        hu[inside] = np.broadcast_to(LUNG - 0.6 * y, hu.shape)[inside]
    hu[HEART.depth(x, y, z) > 0] = BLOOD - 40
    hu[AORTA.depth(x, y, z) > 0] = BLOOD
    hu[TRACHEA.depth(x, y, z) > 0] = AIR + 15
    spine = SPINE.depth(x, y, z)
    is_disc = z % 26 < 5
    hu[spine > 0] = 90 if is_disc else MARROW
    hu[(spine > 0) & (spine < 0.25) & (not is_disc)] = BONE
    return hu


def _vessels(chance: Generator) -> Iterator[Ball]:
    """Trees that grow from where the heart meets each lung, and end at its surface."""
    for lung in LUNGS:
        root = np.array([lung.center[0] * 0.4, 0.0, 0.0])
        outward = np.array([np.sign(lung.center[0]), 0.0, 0.0])
        tips = [(root, outward + chance.normal(0, 0.9, 3), 5.0) for _ in range(10)]
        while tips:
            place, direction, radius = tips.pop()
            for _ in range(int(chance.integers(5, 12))):
                direction = direction + chance.normal(0, 0.18, 3)
                direction /= np.linalg.norm(direction)
                place = place + direction * max(radius, 1.5)
                yield Ball(place, radius, MUSCLE)
            if radius > 0.9 and _is_inside(lung, place):
                for share in (0.75, 0.7):
                    tips.append((place, direction + chance.normal(0, 0.6, 3), radius * share))


def _nodules(chance: Generator) -> Iterator[Ball]:
    """Three to eight, less those that would be in the heart; a quarter of them ground glass."""
    for _ in range(int(chance.integers(3, 9))):
        lung = LUNGS[int(chance.integers(2))]
        direction = chance.normal(size=3)
        direction *= chance.uniform(0.3, 0.85) / np.linalg.norm(direction)
        center = np.array(lung.center) + direction * np.array(lung.radii)
        hu = -600 if chance.random() < 0.25 else 40
        nodule = Ball(center, chance.uniform(2, 12), hu)
        if not _is_inside(HEART, center):
            yield nodule


def _is_inside(ellipsoid: Ellipsoid, place: Place) -> bool:
    x, y, z = (np.float32(value) for value in place)
    return bool(ellipsoid.depth(x, y, z) > 0)


def _paint(
    volume: Volume, ball: Ball, axes: list[NDArray[np.float64]], spacing: NDArray[np.float64]
) -> None:
    """Put a ball into the volume; a voxel at its edge gets a share of it."""
    reach = ball.radius_mm + spacing.max()
    parts = [
        slice(*np.searchsorted(axis, (middle - reach, middle + reach)))
        for axis, middle in zip(axes, ball.center, strict=True)
    ]
    dx, dy, dz = (
        axis[part] - middle for axis, part, middle in zip(axes, parts, ball.center, strict=True)
    )
    distance = np.sqrt(dx[:, None, None] ** 2 + dy[None, :, None] ** 2 + dz[None, None, :] ** 2)
    share = np.clip((ball.radius_mm - distance) / spacing.mean() + 0.5, 0, 1).astype(np.float32)
    around = volume[tuple(parts)]
    around += share * (ball.hu - around)


def _noise(chance: Generator, size: tuple[int, ...]) -> Volume:
    """Noise of `NOISE_HU` whose neighbours are alike, as reconstruction makes it."""
    white = chance.standard_normal(size, np.float32)
    smooth = white + 0.7 * np.roll(white, 1, axis=0) + 0.7 * np.roll(white, 1, axis=1)
    noise: Volume = smooth * np.float32(NOISE_HU / np.sqrt(1 + 2 * 0.7**2))
    return noise
