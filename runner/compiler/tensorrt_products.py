"""Matrix products of few rows, written so that TensorRT-RTX reads their weights fast.

Such a product takes as long as its weights take to be read. RTX has no kernel for it that reads
as fast as others do; the same product as a multiplication and a sum, as a convolution, or cut
along its sum does better (docs/measurements.md). On another GPU or version that may differ.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

_Form = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

_DTYPES = (torch.float16, torch.bfloat16)
_MOST_ROWS = 64
_WIDE = 4096
"""A product with more columns is faster as a convolution."""
_WIDEST = 32768
"""The head of a language model is wider, and fast as it is."""
_LONG = 8192
"""A sum over more than this is cut in parts."""
_PARTS = 4


def is_slow_product(node: torch.fx.Node) -> bool:
    """Whether `product` writes a node anew."""
    if node.target is not torch.ops.aten.linear.default:
        return False
    x, weight = (node.args[i].meta["val"] for i in range(2))  # type: ignore[union-attr]
    return _form(x, weight) is not None


def product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """As `aten.linear` up to rounding: sums are in float32, but each part of a sum that is cut is
    rounded. NotImplemented says that it is fast as it is.
    """
    form = _form(x, weight)
    if form is None:
        return NotImplemented  # type: ignore[no-any-return]
    found = form(x, weight)
    return found if bias is None else found + bias


def _form(x: torch.Tensor, weight: torch.Tensor) -> _Form | None:
    """How to write x (rows, sum) times weight (columns, sum); None: as it is."""
    columns, length = weight.shape
    if x.dim() != 2 or x.dtype not in _DTYPES or columns > _WIDEST or len(x) > _MOST_ROWS:
        return None
    if length > _LONG and length % _PARTS == 0:
        return _in_parts
    if len(x) == 1:
        return _as_sum
    return _as_convolution if columns > _WIDE else None


def _as_sum(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    products = x.float() * weight.float()
    return products.sum(-1).unsqueeze(0).to(x.dtype)


def _as_convolution(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    pixels, kernels = (y[:, :, None, None] for y in (x, weight))
    return F.conv2d(pixels, kernels).flatten(1)


def _in_parts(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    left, right = (y.view(len(y), _PARTS, -1) for y in (x, weight))
    parts = left.transpose(0, 1) @ right.permute(1, 2, 0)
    return parts.sum(0)
