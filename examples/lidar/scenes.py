"""Synthetic street scenes as a scanning LiDAR sees them, with the class of every point.

The sensor is at the origin, x along the street, z up, in metres. Everything depends on the seed
alone. Not here: how rays meet shapes (`shapes`).
"""

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from examples.lidar.shapes import Array, Box, Cylinder, Ellipsoid, Plane, Shape

CLASSES = ("ground", "building", "pole", "car", "vegetation")
GROUND, BUILDING, POLE, CAR, VEGETATION = range(len(CLASSES))

NUM_BEAMS = 64
NUM_AZIMUTHS = 160
ELEVATION_DEG = (-24.0, 12.0)
SENSOR_HEIGHT_M = 1.8
MAX_RANGE_M = 45.0
RANGE_NOISE_M = 0.03
DROPOUT = 0.08
POROSITY = 0.35
"""Share of the rays that pass through a crown or a bush."""

# Mean and spread of the reflectivity of an object, by class. They overlap: intensity alone does
# not tell the classes apart.
_REFLECTIVITY = ((0.25, 0.06), (0.45, 0.15), (0.60, 0.18), (0.50, 0.22), (0.35, 0.10))


@dataclass(frozen=True)
class Scene:
    """One scan.

    Attributes:
        points: (4, num_points) float32: x, y, z in metres and the intensity in 0 to 1.
        labels: (num_points,) int64, an index of `CLASSES`.
    """

    points: NDArray[np.float32]
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class Thing:
    """A shape and what it is."""

    shape: Shape
    label: int


def make_scene(seed: int, *, num_points: int = 4096) -> Scene:
    """The scan of a street of its own for every seed.

    Of the rays that come back, `num_points` are kept, at random and in random order; where fewer
    come back, some are kept twice.
    """
    rng = np.random.default_rng(seed)
    return _scan(_street(rng), rng, num_points)


def _street(rng: Generator) -> list[Thing]:
    """The things of a street that passes the sensor at an angle of up to 12 degrees."""
    ground = Plane(-SENSOR_HEIGHT_M, *rng.normal(0, 0.008, 2))
    kerb = rng.uniform(4.0, 6.5)
    facade = kerb + rng.uniform(3.0, 7.0)
    shift, yaw = rng.uniform(-2.0, 2.0), rng.uniform(-0.2, 0.2)
    place = _Place(shift, yaw)
    things = [Thing(ground, GROUND)]
    for side in (-1.0, 1.0):
        things += _buildings(rng, place, side * facade)
        things += _poles(rng, place, side * (kerb + rng.uniform(0.4, 1.0)))
        things += _cars(rng, place, side * (kerb - 1.2), mean_gap=9.0)
        things += _plants(rng, place, side * (kerb + facade) / 2)
    return things + _cars(rng, place, rng.uniform(-1.5, 1.5), mean_gap=30.0)


@dataclass(frozen=True)
class _Place:
    """From the street's frame to the sensor's: moved sideways, then turned."""

    shift: float
    yaw: float

    def __call__(self, x: float, y: float) -> tuple[float, float]:
        cos, sin, y = np.cos(self.yaw), np.sin(self.yaw), y + self.shift
        return float(cos * x - sin * y), float(sin * x + cos * y)


def _along(rng: Generator, mean_gap: float, length: float = 0.0) -> Array:
    """Positions along the street, an exponential gap and `length` apart."""
    steps = length + rng.exponential(mean_gap, size=64)
    positions = np.cumsum(steps) - MAX_RANGE_M
    return positions[positions < MAX_RANGE_M]


def _buildings(rng: Generator, place: _Place, y: float) -> list[Thing]:
    things, depth = [], 8.0
    for x in _along(rng, 4.0, length=14.0):
        width, height = rng.uniform(7.0, 13.0), rng.uniform(4.0, 15.0)
        setback = np.sign(y) * (depth / 2 + rng.uniform(0.0, 2.0))
        centre = (*place(x, y + setback), height / 2 - SENSOR_HEIGHT_M)
        things.append(Thing(Box(centre, (width, depth, height), place.yaw), BUILDING))
    return things


def _poles(rng: Generator, place: _Place, y: float) -> list[Thing]:
    things = []
    for x in _along(rng, 6.0, length=4.0):
        top = rng.uniform(3.0, 8.0) - SENSOR_HEIGHT_M
        radius = rng.uniform(0.07, 0.18)
        things.append(Thing(Cylinder(*place(x, y), radius, -SENSOR_HEIGHT_M, top), POLE))
    return things


def _cars(rng: Generator, place: _Place, y: float, *, mean_gap: float) -> list[Thing]:
    things = []
    for x in _along(rng, mean_gap, length=5.0):
        length, width, height = rng.uniform((3.6, 1.6, 1.35), (4.8, 1.95, 1.9))
        yaw = place.yaw + rng.normal(0, 0.03)
        across = y + rng.normal(0, 0.15)
        body = (*place(x, across), 0.30 * height + 0.2 - SENSOR_HEIGHT_M)
        cabin = (*place(x - 0.1 * length, across), 0.78 * height - SENSOR_HEIGHT_M)
        things.append(Thing(Box(body, (length, width, 0.6 * height), yaw), CAR))
        things.append(Thing(Box(cabin, (0.55 * length, 0.9 * width, 0.44 * height), yaw), CAR))
    return things


def _plants(rng: Generator, place: _Place, y: float) -> list[Thing]:
    """Trees, which are a trunk and a crown, and bushes."""
    things = []
    for x in _along(rng, 7.0, length=2.0):
        at = place(x, y + rng.normal(0, 0.7))
        if rng.random() < 0.6:
            crown, radii = rng.uniform(2.8, 4.8) - SENSOR_HEIGHT_M, rng.uniform(0.9, 2.0, 3)
            trunk = Cylinder(*at, rng.uniform(0.12, 0.3), -SENSOR_HEIGHT_M, crown)
            things.append(Thing(trunk, VEGETATION))
        else:
            radii = rng.uniform((0.5, 0.5, 0.4), (1.3, 1.0, 1.0))
            crown = 0.6 * radii[2] - SENSOR_HEIGHT_M
        things.append(Thing(Ellipsoid((*at, crown), tuple(radii)), VEGETATION))
    return things


def _rays(rng: Generator) -> Array:
    """Directions (num_rays, 3) of one turn of the scanner, from a random first azimuth."""
    elevation = np.radians(np.linspace(*ELEVATION_DEG, NUM_BEAMS))[:, None]
    azimuth = np.linspace(0, 2 * np.pi, NUM_AZIMUTHS, endpoint=False) + rng.uniform(0, 0.1)
    flat = np.cos(elevation)
    z = np.broadcast_to(np.sin(elevation), (NUM_BEAMS, NUM_AZIMUTHS))
    return np.stack([flat * np.cos(azimuth), flat * np.sin(azimuth), z], axis=-1).reshape(-1, 3)


def _scan(things: list[Thing], rng: Generator, num_points: int) -> Scene:
    rays = _rays(rng)
    ranges = np.stack([_seen(thing, rays, rng) for thing in things])
    nearest, reach = ranges.argmin(axis=0), ranges.min(axis=0)
    back = np.flatnonzero((reach < MAX_RANGE_M) & (rng.random(len(rays)) > DROPOUT))
    kept = rng.permutation(back)
    kept = np.resize(kept, num_points) if len(kept) < num_points else kept[:num_points]

    noisy = reach[kept] + rng.normal(0, RANGE_NOISE_M, num_points)
    intensity = _reflectivities(things, rng)[nearest[kept]] * (1 - noisy / 120)
    intensity = np.clip(intensity + rng.normal(0, 0.04, num_points), 0, 1)
    points = np.concatenate([rays[kept].T * noisy, intensity[None]])
    labels = np.array([thing.label for thing in things], dtype=np.int64)
    return Scene(points.astype(np.float32), labels[nearest[kept]])


def _seen(thing: Thing, rays: Array, rng: Generator) -> Array:
    """Ranges to a thing (num_rays,); leaves let some rays through and others in a little."""
    reach = thing.shape.hit(rays)
    if isinstance(thing.shape, Ellipsoid):
        reach = reach + rng.exponential(0.25, len(rays))
        reach = np.where(rng.random(len(rays)) < POROSITY, np.inf, reach)
    return reach


def _reflectivities(things: list[Thing], rng: Generator) -> Array:
    """One for each thing (num_things,)."""
    mean, spread = np.array([_REFLECTIVITY[thing.label] for thing in things]).T
    reflectivities: Array = np.clip(rng.normal(mean, spread), 0.05, 1.0)
    return reflectivities
