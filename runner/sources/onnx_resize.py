"""Resize as ONNX defines it, for every way to map coordinates, with torch's own where it agrees.

Not here: cubic interpolation other than torch's, antialiasing, crops.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from runner.sources.onnx_operator import Attributes, Operand, UnsupportedError, integers

_ROUND: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "round_prefer_floor": lambda x: np.ceil(x - 0.5),
    "round_prefer_ceil": lambda x: np.floor(x + 0.5),
    "floor": np.floor,
    "ceil": np.ceil,
}
_TORCH_MODES = {
    ("linear", 3): "linear",
    ("linear", 4): "bilinear",
    ("linear", 5): "trilinear",
    ("cubic", 4): "bicubic",
}
_COORDINATES = (
    "half_pixel",
    "half_pixel_symmetric",
    "pytorch_half_pixel",
    "align_corners",
    "asymmetric",
)


def check_resize(attributes: Attributes) -> None:
    """Raises: UnsupportedError: a kind of resizing that is not computed here."""
    wanted = {
        "coordinate_transformation_mode": _COORDINATES,
        "mode": ("nearest", "linear", "cubic"),
        "nearest_mode": tuple(_ROUND),
        "keep_aspect_ratio_policy": ("stretch",),
        "antialias": (0,),
        "exclude_outside": (0,),
    }
    for name, allowed in wanted.items():
        if attributes.get(name, allowed[0]) not in allowed:
            raise UnsupportedError(f"{name}={attributes[name]}")
    if attributes.get("mode") == "cubic":
        if abs(attributes.get("cubic_coeff_a", -0.75) + 0.75) > 1e-6:
            raise UnsupportedError(f"cubic_coeff_a={attributes['cubic_coeff_a']}")
        if _mapping(attributes) not in ("half_pixel", "pytorch_half_pixel", "align_corners"):
            raise UnsupportedError(f"mode=cubic with {_mapping(attributes)}")


def resize(
    attributes: Attributes,
    x: torch.Tensor,
    roi: Operand = None,
    scales: Operand = None,
    sizes: Operand = None,
) -> torch.Tensor:
    """Resize from opset 11 on. Args: roi: of a mode that is refused; not read."""
    del roi
    dims = integers(attributes.get("axes")) or list(range(x.dim()))
    dims = [dim % x.dim() for dim in dims]
    new, factors = list(x.shape), [1.0] * x.dim()
    if sizes is not None and np.size(sizes):
        for dim, size in zip(dims, integers(sizes) or [], strict=True):
            new[dim], factors[dim] = size, size / x.shape[dim]
    else:
        for dim, scale in zip(dims, np.asarray(scales, dtype=np.float32), strict=True):
            new[dim], factors[dim] = math.floor(x.shape[dim] * scale), float(scale)
    return _resized(attributes, x, new, factors)


def upsample(attributes: Attributes, x: torch.Tensor, scales: Operand = None) -> torch.Tensor:
    """Upsample, and Resize of opset 10: asymmetric coordinates, rounded down."""
    old = {
        "mode": attributes.get("mode", "nearest"),
        "coordinate_transformation_mode": "asymmetric",
        "nearest_mode": "floor",
    }
    return resize(old, x, scales=attributes.get("scales") if scales is None else scales)


def _resized(
    attributes: Attributes, x: torch.Tensor, new: Sequence[int], factors: Sequence[float]
) -> torch.Tensor:
    mode = attributes.get("mode", "nearest")
    changed = [dim for dim in range(x.dim()) if new[dim] != x.shape[dim] or factors[dim] != 1.0]
    if not changed:
        return x
    if _is_torchs_own(attributes, x, new, factors, changed):
        corners = _mapping(attributes) == "align_corners" if mode != "nearest" else None
        name = "nearest" if mode == "nearest" else _TORCH_MODES[mode, x.dim()]
        return F.interpolate(x, size=list(new[2:]), mode=name, align_corners=corners)
    if mode == "cubic":
        raise UnsupportedError("mode=cubic with other than the last two axes of four")
    for dim in changed:
        where = _coordinates(attributes, x.shape[dim], new[dim], factors[dim])
        x = _nearest(attributes, x, dim, where) if mode == "nearest" else _linear(x, dim, where)
    return x


def _mapping(attributes: Attributes) -> str:
    return str(attributes.get("coordinate_transformation_mode", "half_pixel"))


def _is_torchs_own(
    attributes: Attributes,
    x: torch.Tensor,
    new: Sequence[int],
    factors: Sequence[float],
    changed: Sequence[int],
) -> bool:
    """Whether `F.interpolate`, which knows the sizes alone, computes the same."""
    mode, mapping = attributes.get("mode", "nearest"), _mapping(attributes)
    exact = all(abs(new[dim] - x.shape[dim] * factors[dim]) < 1e-4 for dim in changed)
    if min(changed) < 2 or not exact:
        return False
    if mode == "nearest":
        rounded_down = attributes.get("nearest_mode", "round_prefer_floor") == "floor"
        # In floating point torch's own index may be one off, except for whole factors.
        whole = all(new[dim] % x.shape[dim] == 0 for dim in changed)
        return mapping == "asymmetric" and rounded_down and whole and x.dim() in (3, 4, 5)
    if (mode, x.dim()) not in _TORCH_MODES:
        return False
    if mapping == "pytorch_half_pixel":
        return all(new[dim] > 1 for dim in changed)
    return mapping in ("half_pixel", "align_corners")


def _coordinates(attributes: Attributes, old: int, new: int, factor: float) -> np.ndarray:
    """Where in the old axis each place of the new one lies: (new,).

    A place half-way between two is decided by rounding, so the precision is ONNX Runtime's.
    """
    mapping = _mapping(attributes)
    place = np.arange(new, dtype=np.float32)
    scale = np.float32(factor)
    if mapping == "asymmetric":
        return np.arange(new, dtype=np.float64) / factor
    if mapping == "align_corners":
        return place * np.float32(old - 1) / np.float32(max(new - 1, 1))
    if mapping == "pytorch_half_pixel" and new == 1:
        return np.zeros(1, np.float32)
    where = (place + np.float32(0.5)) / scale - np.float32(0.5)
    if mapping == "half_pixel_symmetric":
        return where + np.float32(old / 2 * (1 - new / (factor * old)))
    return where


def _nearest(attributes: Attributes, x: torch.Tensor, dim: int, where: np.ndarray) -> torch.Tensor:
    rounded = _ROUND[attributes.get("nearest_mode", "round_prefer_floor")](where)
    return x.index_select(dim, _index(rounded, x, dim))


def _linear(x: torch.Tensor, dim: int, where: np.ndarray) -> torch.Tensor:
    inside = np.clip(where, 0, x.shape[dim] - 1)
    below = np.floor(inside)
    share = torch.from_numpy(inside - below).to(x)
    share = share.reshape(-1, *[1] * (x.dim() - dim - 1))
    first = x.index_select(dim, _index(below, x, dim))
    return torch.lerp(first, x.index_select(dim, _index(below + 1, x, dim)), share)


def _index(places: np.ndarray, x: torch.Tensor, dim: int) -> torch.Tensor:
    kept = np.clip(places, 0, x.shape[dim] - 1).astype(np.int64)
    return torch.from_numpy(kept).to(x.device)
