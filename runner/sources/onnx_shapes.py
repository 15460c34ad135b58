"""Operators of ONNX that cut, join or rearrange, with their shapes as numpy arrays.

So no shape depends on data. Not here: arithmetic.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

from runner.sources.onnx_operator import Attributes, Operand, axes_of, integers


def reshape(attributes: Attributes, x: torch.Tensor, shape: Operand) -> torch.Tensor:
    sizes = integers(shape) or []
    if not attributes.get("allowzero", 0):
        sizes = [x.shape[dim] if size == 0 else size for dim, size in enumerate(sizes)]
    return x.reshape(sizes)


def flatten(attributes: Attributes, x: torch.Tensor) -> torch.Tensor:
    axis = attributes.get("axis", 1)
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


def squeeze(attributes: Attributes, x: torch.Tensor, axes: Operand = None) -> torch.Tensor:
    dims = axes_of(attributes, axes)
    return x.squeeze() if dims is None else x.squeeze(dims)


def unsqueeze(attributes: Attributes, x: torch.Tensor, axes: Operand = None) -> torch.Tensor:
    dims = axes_of(attributes, axes) or []
    rank = x.dim() + len(dims)
    for dim in sorted(dim % rank for dim in dims):
        x = x.unsqueeze(dim)
    return x


def slice_dims(
    attributes: Attributes,
    x: torch.Tensor,
    starts: Operand = None,
    ends: Operand = None,
    axes: Operand = None,
    steps: Operand = None,
) -> torch.Tensor:
    first = integers(attributes.get("starts") if starts is None else starts) or []
    last = integers(attributes.get("ends") if ends is None else ends) or []
    dims = axes_of(attributes, axes) or list(range(len(first)))
    strides = integers(steps) or [1] * len(first)
    for dim, start, end, step in zip(dims, first, last, strides, strict=True):
        kept = range(x.shape[dim])[_python_slice(start, end, step, x.shape[dim])]
        if step > 0:
            x = x.narrow(dim, 0, 0) if not kept else _strided(x, dim, kept)
        else:
            x = x.index_select(dim, torch.tensor(list(kept), dtype=torch.long, device=x.device))
    return x


def _strided(x: torch.Tensor, dim: int, kept: range) -> torch.Tensor:
    where = [slice(None)] * x.dim()
    where[dim] = slice(kept[0], kept[-1] + 1, kept.step)
    return x[tuple(where)]


def _python_slice(start: int, end: int, step: int, size: int) -> slice:
    """ONNX writes "to the very beginning" as an end below -size, Python as None."""
    return slice(start, None if step < 0 and end < -size else end, step)


def expand(_: Attributes, x: torch.Tensor, shape: Operand) -> torch.Tensor:
    wanted = integers(shape) or []
    rank = max(x.dim(), len(wanted))
    old = [1] * (rank - x.dim()) + list(x.shape)
    new = [1] * (rank - len(wanted)) + wanted
    return x.expand([a if b == 1 else b for a, b in zip(old, new, strict=True)])


def tile(_: Attributes, x: torch.Tensor, repeats: Operand) -> torch.Tensor:
    return x.repeat(integers(repeats) or [])


def split(
    attributes: Attributes, x: torch.Tensor, sizes: Operand = None
) -> tuple[torch.Tensor, ...]:
    dim = attributes.get("axis", 0)
    parts = integers(attributes.get("split") if sizes is None else sizes)
    if parts is None:
        each = -(-x.shape[dim] // attributes["num_outputs"])
        return torch.split(x, each, dim)
    return torch.split(x, parts, dim)


_PAD_MODES = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}


def pad(
    attributes: Attributes,
    x: torch.Tensor,
    pads: Operand = None,
    value: Operand = None,
    axes: Operand = None,
) -> torch.Tensor:
    amounts = integers(attributes.get("pads") if pads is None else pads) or []
    dims = integers(axes) or list(range(x.dim()))
    mode = _PAD_MODES[attributes.get("mode", "constant")]
    before = dict(zip((d % x.dim() for d in dims), amounts[: len(dims)], strict=True))
    after = dict(zip((d % x.dim() for d in dims), amounts[len(dims) :], strict=True))
    if mode == "constant":
        fill = attributes.get("value", 0.0) if value is None else np.asarray(value).item()
        both = [(before.get(d, 0), after.get(d, 0)) for d in reversed(range(x.dim()))]
        return F.pad(x, [amount for pair in both for amount in pair], value=fill)
    for dim in range(x.dim()):
        if before.get(dim, 0) or after.get(dim, 0):
            x = _pad_dim(x, dim, before.get(dim, 0), after.get(dim, 0), mode)
    return x


_NUMPY_PADS = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def _pad_dim(x: torch.Tensor, dim: int, before: int, after: int, mode: str) -> torch.Tensor:
    """By an index: torch pads by reflection at most the last three dims."""
    cut = x.narrow(dim, max(-before, 0), x.shape[dim] - max(-before, 0) - max(-after, 0))
    extra = (max(before, 0), max(after, 0))
    source = np.pad(np.arange(cut.shape[dim]), extra, mode=_NUMPY_PADS[mode])  # type: ignore[call-overload]
    return cut.index_select(dim, torch.from_numpy(source).to(x.device))


def clip(
    attributes: Attributes, x: torch.Tensor, low: Operand = None, high: Operand = None
) -> torch.Tensor:
    least = attributes.get("min") if low is None else np.asarray(low).item()
    most = attributes.get("max") if high is None else np.asarray(high).item()
    return x if least is None and most is None else x.clamp(least, most)
