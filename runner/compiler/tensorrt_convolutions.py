"""Convolutions of few channels, written so that TensorRT-RTX has fast kernels for them.

The first convolution of a vision model sees three channels or one, for which RTX has no kernel that
uses tensor cores; with sixteen it has. So what lies between two steps of the kernel becomes
channels (space to depth), seen by a smaller kernel of stride 1, and zeros fill up the rest
(docs/measurements.md: stems of 7 x 7). It is left alone where that multiplies more than to fill up
its channels would. On another GPU or version that may differ.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F

CONVOLUTIONS = (torch.ops.aten.conv2d.default, torch.ops.aten.conv3d.default)

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_CHANNELS = 16

_Padding = tuple[int, int]
"""Zeros before and after."""


def is_slow_convolution(node: torch.fx.Node) -> bool:
    """Whether `convolution` writes a node anew."""
    if node.target not in CONVOLUTIONS:
        return False
    x, weight = (node.args[i].meta["val"] for i in range(2))  # type: ignore[union-attr]
    return _axes_of(x, weight, *node.args[3:]) is not None  # type: ignore[arg-type]


def convolution(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Sequence[int] = (1,),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    groups: int = 1,
) -> torch.Tensor:
    """The same sums as those of `aten.conv2d` and `aten.conv3d`, with zeros among them: so of
    finite numbers. NotImplemented says that it is fast as it is.
    """
    axes = _axes_of(x, weight, stride, padding, dilation, groups)
    if axes is None:
        return NotImplemented  # type: ignore[no-any-return]
    for dim, axis in enumerate(axes, start=2):
        x = _of_length(x, dim, axis.num_read)
    strides = [axis.stride for axis in axes]
    pixels = _to_depth(x, strides)
    kernels = _to_depth(_padded(weight, [axis.around_kernel for axis in axes]), strides)
    channels = 0, _filled_up(pixels.shape[1]) - pixels.shape[1]
    convolve = F.conv2d if x.dim() == 4 else F.conv3d
    return convolve(
        _padded(pixels, [channels, *(axis.around_pixels for axis in axes)]),
        _padded(kernels, [channels, *((0, 0) for _ in axes)]),
        bias,
    )


@dataclass(frozen=True)
class _Axis:
    """A spatial dim of a convolution, and of what it becomes at stride 1.

    Tap t of the kernel at place i saw i * stride + t - padding. That is in place i + a - before,
    where it is channel r, for t + shift = a * stride + r.
    """

    length: int
    kernel: int
    stride: int
    padding: int

    @property
    def before(self) -> int:
        """Places of zeros before the first one."""
        return -(-self.padding // self.stride)

    @property
    def shift(self) -> int:
        return self.before * self.stride - self.padding

    @property
    def taps(self) -> int:
        """Of the new kernel."""
        return -(-(self.kernel + self.shift) // self.stride)

    @property
    def num_places(self) -> int:
        """That are seen, from the first one on."""
        num_out = (self.length + 2 * self.padding - self.kernel) // self.stride + 1
        return num_out + self.taps - 1 - self.before

    @property
    def num_read(self) -> int:
        """How long the dim must be for whole places; the rest of them is zeros."""
        return self.stride * min(-(-self.length // self.stride), self.num_places)

    @property
    def around_pixels(self) -> _Padding:
        return self.before, self.num_places - self.num_read // self.stride

    @property
    def around_kernel(self) -> _Padding:
        return self.shift, self.taps * self.stride - self.kernel - self.shift


def _axes_of(
    x: torch.Tensor,
    weight: torch.Tensor,
    stride: Sequence[int] = (1,),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    groups: int = 1,
) -> list[_Axis] | None:
    """What to change; None: nothing."""
    kernel = weight.shape[2:]
    if x.dim() != weight.dim() or x.dtype not in _DTYPES or x.shape[1] >= _CHANNELS:
        return None
    if groups != 1 or any(step != 1 for step in dilation) or prod(kernel) == 1:
        return None
    strides, paddings = (_of_all(given, len(kernel)) for given in (stride, padding))
    if any(step > size for step, size in zip(strides, kernel, strict=True)):
        return None
    axes = [_Axis(*sizes) for sizes in zip(x.shape[2:], kernel, strides, paddings, strict=True)]
    products = prod(axis.taps for axis in axes) * _filled_up(x.shape[1] * prod(strides))
    return axes if products <= prod(kernel) * _CHANNELS else None


def _filled_up(channels: int) -> int:
    return -(-channels // _CHANNELS) * _CHANNELS


def _of_all(given: Sequence[int], num_dims: int) -> Sequence[int]:
    return list(given) * num_dims if len(given) == 1 else given


def _of_length(x: torch.Tensor, dim: int, length: int) -> torch.Tensor:
    """With zeros at the end of a dim, or without what is beyond."""
    missing = length - x.shape[dim]
    if missing < 0:
        return x.narrow(dim, 0, length)
    return _padded(x, [(0, missing), *[(0, 0)] * (x.dim() - 1 - dim)])


def _padded(x: torch.Tensor, amounts: Sequence[_Padding]) -> torch.Tensor:
    """With zeros around its last dims."""
    if not any(map(any, amounts)):
        return x
    return F.pad(x, [zeros for amount in reversed(amounts) for zeros in amount])


def _to_depth(x: torch.Tensor, strides: Sequence[int]) -> torch.Tensor:
    """(n, channels, *places * stride) as (n, channels * product of the strides, *places)."""
    shape, inner, outer = list(x.shape[:2]), [], []
    for length, stride in zip(x.shape[2:], strides, strict=True):
        outer.append(len(shape))
        shape.append(length // stride)
        if stride > 1:
            inner.append(len(shape))
            shape.append(stride)
    return x.reshape(shape).permute(0, 1, *inner, *outer).flatten(1, 1 + len(inner))
