"""Operators of ONNX that move a window over a tensor: convolutions and pools.

Their padding may differ from side to side, as torch's may not. Not here: global pools.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from runner.sources.onnx_operator import Attributes, UnsupportedError


def _pads(attributes: Attributes, sizes: Sequence[int], kernel: Sequence[int]) -> list[int]:
    """Begins and then ends, as ONNX has them."""
    auto, rank = attributes.get("auto_pad", "NOTSET"), len(kernel)
    if auto == "NOTSET":
        return list(attributes.get("pads") or [0] * 2 * rank)
    if auto == "VALID":
        return [0] * 2 * rank
    strides = attributes.get("strides") or [1] * rank
    dilations = attributes.get("dilations") or [1] * rank
    total = [
        max((-(-size // step) - 1) * step + (length - 1) * gap + 1 - size, 0)
        for size, length, step, gap in zip(sizes, kernel, strides, dilations, strict=True)
    ]
    less, more = [amount // 2 for amount in total], [amount - amount // 2 for amount in total]
    return [*less, *more] if auto == "SAME_UPPER" else [*more, *less]


def _padded(x: torch.Tensor, pads: Sequence[int], value: float) -> torch.Tensor:
    rank = len(pads) // 2
    both = [(pads[dim], pads[rank + dim]) for dim in reversed(range(rank))]
    return F.pad(x, [amount for pair in both for amount in pair], value=value)


def max_pool(attributes: Attributes, x: torch.Tensor) -> torch.Tensor:
    kernel = attributes["kernel_shape"]
    pads = _pads(attributes, x.shape[2:], kernel)
    function = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(kernel) - 1]
    return function(
        _padded(x, pads, float("-inf")) if any(pads) else x,
        kernel,
        attributes.get("strides") or [1] * len(kernel),
        dilation=attributes.get("dilations") or 1,
        ceil_mode=bool(attributes.get("ceil_mode", 0)),
    )


def check_max_pool(attributes: Attributes) -> None:
    if attributes.get("storage_order", 0):
        raise UnsupportedError("storage_order=1")
    if attributes.get("ceil_mode", 0) and any(attributes.get("pads") or ()):
        raise UnsupportedError("ceil_mode=1 with pads")


def average_pool(attributes: Attributes, x: torch.Tensor) -> torch.Tensor:
    kernel = attributes["kernel_shape"]
    pads = _pads(attributes, x.shape[2:], kernel)
    function = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[len(kernel) - 1]
    strides = attributes.get("strides") or [1] * len(kernel)

    def pooled(values: torch.Tensor) -> torch.Tensor:
        ceil_mode = bool(attributes.get("ceil_mode", 0))
        return function(values, kernel, strides, ceil_mode=ceil_mode)

    if not any(pads):
        return pooled(x)
    mean = pooled(_padded(x, pads, 0.0))
    if attributes.get("count_include_pad", 0):
        return mean
    # The share of each window that is no padding.
    inside = torch.ones((1, 1, *x.shape[2:]), dtype=x.dtype, device=x.device)
    return mean / pooled(_padded(inside, pads, 0.0))


def check_average_pool(attributes: Attributes) -> None:
    if any(gap != 1 for gap in attributes.get("dilations") or ()):
        raise UnsupportedError("dilations")
    if attributes.get("ceil_mode", 0) and any(attributes.get("pads") or ()):
        raise UnsupportedError("ceil_mode=1 with pads")


def convolution(
    attributes: Attributes,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    kernel = list(weight.shape[2:])
    pads, rank = _pads(attributes, x.shape[2:], kernel), len(kernel)
    symmetric = pads[:rank] == pads[rank:]
    function = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    return function(
        x if symmetric else _padded(x, pads, 0.0),
        weight,
        bias,
        stride=attributes.get("strides") or 1,
        padding=pads[:rank] if symmetric else 0,
        dilation=attributes.get("dilations") or 1,
        groups=attributes.get("group", 1),
    )


def transposed_convolution(
    attributes: Attributes,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Computed without padding, and then cut, for ONNX may cut the sides differently."""
    rank = weight.dim() - 2
    pads = list(attributes.get("pads") or [0] * 2 * rank)
    function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[rank - 1]
    symmetric = pads[:rank] == pads[rank:]
    y = function(
        x,
        weight,
        bias,
        stride=attributes.get("strides") or 1,
        padding=pads[:rank] if symmetric else 0,
        output_padding=attributes.get("output_padding") or 0,
        groups=attributes.get("group", 1),
        dilation=attributes.get("dilations") or 1,
    )
    return y if symmetric else _padded(y, [-amount for amount in pads], 0.0)


def check_transposed(attributes: Attributes) -> None:
    for name in ("output_shape", "auto_pad"):
        if attributes.get(name, "NOTSET") != "NOTSET":
            raise UnsupportedError(name)
