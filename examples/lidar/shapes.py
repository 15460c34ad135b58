"""Where rays meet simple shapes: the geometry of the synthetic LiDAR. Not here: what stands where.

Every `hit` takes ray directions (num_rays, 3) of length 1 from the origin and returns the range in
metres (num_rays,), inf where a ray misses.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class Shape(Protocol):
    """What a ray can hit."""

    def hit(self, rays: Array) -> Array:
        """The range of the first hit."""
        ...


@dataclass(frozen=True)
class Plane:
    """The ground: z = height + slope_x * x + slope_y * y."""

    height: float
    slope_x: float = 0.0
    slope_y: float = 0.0

    def hit(self, rays: Array) -> Array:
        """The range of the first hit."""
        fall = rays[:, 2] - self.slope_x * rays[:, 0] - self.slope_y * rays[:, 1]
        return _nearest(np.divide(self.height, fall, out=np.full_like(fall, -1.0), where=fall != 0))


@dataclass(frozen=True)
class Box:
    """A box that stands upright, turned by `yaw` radians about its vertical axis."""

    centre: tuple[float, float, float]
    size: tuple[float, float, float]
    yaw: float = 0.0

    def hit(self, rays: Array) -> Array:
        """The range of the first hit, by the slab method in the box's own frame."""
        cos, sin = np.cos(self.yaw), np.sin(self.yaw)
        turn = np.array([[cos, sin, 0.0], [-sin, cos, 0.0], [0.0, 0.0, 1.0]])
        origin, half = turn @ -np.array(self.centre), np.array(self.size) / 2
        directions = rays @ turn.T
        directions = np.where(np.abs(directions) < 1e-9, 1e-9, directions)
        one, other = (-half - origin) / directions, (half - origin) / directions
        enter = np.minimum(one, other).max(axis=1)
        leave = np.maximum(one, other).min(axis=1)
        return _nearest(np.where(enter <= leave, enter, -1.0))


@dataclass(frozen=True)
class Cylinder:
    """An upright cylinder without lids, such as a pole or a trunk."""

    x: float
    y: float
    radius: float
    bottom: float
    top: float

    def hit(self, rays: Array) -> Array:
        """The range of the first hit."""
        square = (rays[:, :2] ** 2).sum(axis=1)
        along = rays[:, 0] * self.x + rays[:, 1] * self.y
        rest = self.x**2 + self.y**2 - self.radius**2
        reach = _first_root(np.maximum(square, 1e-12), along, rest)
        z = reach * rays[:, 2]
        return np.where((z >= self.bottom) & (z <= self.top), _nearest(reach), np.inf)


@dataclass(frozen=True)
class Ellipsoid:
    """A crown or a bush: an ellipsoid with its axes along x, y and z."""

    centre: tuple[float, float, float]
    radii: tuple[float, float, float]

    def hit(self, rays: Array) -> Array:
        """The range of the first hit."""
        directions, centre = rays / np.array(self.radii), np.array(self.centre) / self.radii
        square = (directions**2).sum(axis=1)
        return _nearest(_first_root(square, directions @ centre, float(centre @ centre) - 1))


def _first_root(square: Array, along: Array, rest: float) -> Array:
    """The smaller root of `square * t**2 - 2 * along * t + rest = 0`; -1 where there is none."""
    inside = along**2 - square * rest
    return np.where(inside >= 0, (along - np.sqrt(np.maximum(inside, 0))) / square, -1.0)


def _nearest(reach: Array) -> Array:
    """Ranges, with inf for what lies behind the sensor."""
    return np.where(reach > 0, reach, np.inf)
