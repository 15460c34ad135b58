"""The operators of ONNX that onnx2torch lacks, or computes otherwise than ONNX says.

The table below says what computes each. Not here: what onnx2torch does well.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from runner.sources import onnx_shapes, onnx_windows
from runner.sources.onnx_operator import Attributes, Converter, Operand, UnsupportedError, axes_of
from runner.sources.onnx_resize import check_resize, resize, upsample


def _reduction(function: Callable[..., torch.Tensor]) -> Converter:
    def run(attributes: Attributes, x: torch.Tensor, axes: Operand = None) -> torch.Tensor:
        dims = axes_of(attributes, axes)
        if not dims and attributes.get("noop_with_empty_axes", 0):
            return x
        every = dims or list(range(x.dim()))
        return function(x, every, keepdim=bool(attributes.get("keepdims", 1)))

    return Converter(run, host=(1,))


def _sum(x: torch.Tensor, dims: list[int], *, keepdim: bool) -> torch.Tensor:
    return x.sum(dims, keepdim=keepdim, dtype=x.dtype)


def _prod(x: torch.Tensor, dims: list[int], *, keepdim: bool) -> torch.Tensor:
    for dim in sorted({dim % x.dim() for dim in dims}, reverse=True):
        x = x.prod(dim, keepdim=keepdim, dtype=x.dtype)
    return x


def _cumulative_sum(attributes: Attributes, x: torch.Tensor, axis: Operand) -> torch.Tensor:
    dim, reverse = int(np.asarray(axis).item()) % x.dim(), attributes.get("reverse", 0)
    if reverse:
        x = x.flip(dim)
    if attributes.get("exclusive", 0):
        zeros_before = [0, 0] * (x.dim() - 1 - dim) + [1, 0]
        x = F.pad(x, zeros_before).narrow(dim, 0, x.shape[dim])
    total = x.cumsum(dim, dtype=x.dtype)
    return total.flip(dim) if reverse else total


def _power(_: Attributes, x: torch.Tensor, exponent: torch.Tensor) -> torch.Tensor:
    """In the base's type; an integer's in float64 between, which holds more integers exactly."""
    of_integer = exponent.is_floating_point() and not x.is_floating_point()
    power = torch.pow(x.double() if of_integer else x, exponent)
    return power if power.dtype == x.dtype else power.to(x.dtype)


def _is_inf(attributes: Attributes, x: torch.Tensor) -> torch.Tensor:
    above, below = (attributes.get(f"detect_{sign}", 1) for sign in ("positive", "negative"))
    if above and below:
        return torch.isinf(x)
    if not above and not below:
        return torch.zeros_like(x, dtype=torch.bool)
    return torch.isposinf(x) if above else torch.isneginf(x)


def _cast(attributes: Attributes, x: torch.Tensor) -> torch.Tensor:
    return x.to(DTYPES[attributes["to"]])


def _batch_norm(
    attributes: Attributes,
    x: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    mean: torch.Tensor,
    variance: torch.Tensor,
) -> torch.Tensor:
    epsilon = attributes.get("epsilon", 1e-5)
    return F.batch_norm(x, mean, variance, scale, bias, training=False, eps=epsilon)


def _check_batch_norm(attributes: Attributes) -> None:
    if attributes.get("training_mode", 0):
        raise UnsupportedError("training_mode=1")


def _global_average(_: Attributes, x: torch.Tensor) -> torch.Tensor:
    return x.mean(list(range(2, x.dim())), keepdim=True)


def _global_max(_: Attributes, x: torch.Tensor) -> torch.Tensor:
    return x.amax(list(range(2, x.dim())), keepdim=True)


def _instance_norm(
    attributes: Attributes, x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    return F.instance_norm(x, weight=scale, bias=bias, eps=attributes.get("epsilon", 1e-5))


def _layer_norm(
    attributes: Attributes,
    x: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    shape = x.shape[attributes.get("axis", -1) % x.dim() :]
    bias = None if bias is None else bias.expand(shape)
    return F.layer_norm(x, shape, scale.expand(shape), bias, attributes.get("epsilon", 1e-5))


def _softmax(attributes: Attributes, x: torch.Tensor) -> torch.Tensor:
    return torch.softmax(x, attributes.get("axis", -1))


def _flat_softmax(attributes: Attributes, x: torch.Tensor) -> torch.Tensor:
    """Before opset 13: over all axes from `axis` on."""
    axis = attributes.get("axis", 1) % x.dim()
    return torch.softmax(x.flatten(axis), axis).reshape(x.shape)


def _gather(attributes: Attributes, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    dim = attributes.get("axis", 0) % x.dim()
    positive = torch.where(index < 0, index + x.shape[dim], index).long()
    found = x.index_select(dim, positive.reshape(-1))
    return found.reshape(*x.shape[:dim], *index.shape, *x.shape[dim + 1 :])


def _hard_sigmoid(attributes: Attributes, x: torch.Tensor) -> torch.Tensor:
    slope, offset = float(attributes.get("alpha", 0.2)), float(attributes.get("beta", 0.5))
    return (x * slope + offset).clamp(0.0, 1.0)


def _gelu(attributes: Attributes, x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate=str(attributes.get("approximate", "none")))


def _quantize_dynamically(
    _: Attributes, x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One scale for the whole tensor, so a result depends on all that is in the batch."""
    low, high = x.amin().clamp(max=0.0), x.amax().clamp(min=0.0)
    scale = (high - low) / 255.0
    safe = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero = torch.round(-low / safe).clamp(0, 255)
    rounded = (torch.round(x / safe) + zero).clamp(0, 255)
    return rounded.to(torch.uint8), scale, zero.to(torch.uint8)


def _convolve_integers(
    attributes: Attributes,
    x: torch.Tensor,
    weight: torch.Tensor,
    x_zero: torch.Tensor | None = None,
    weight_zero: torch.Tensor | None = None,
) -> torch.Tensor:
    """In float64, which holds every sum of such products exactly."""
    wide = x.double() if x_zero is None else x.double() - x_zero.double()
    kernel = weight.double()
    if weight_zero is not None:
        kernel = kernel - weight_zero.double().reshape(-1, *[1] * (weight.dim() - 1))
    return onnx_windows.convolution(attributes, wide, kernel).to(torch.int32)


DTYPES = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    11: torch.float64,
    16: torch.bfloat16,
}
"""onnx.TensorProto.DataType -> torch dtype."""


def _check_cast(attributes: Attributes) -> None:
    if attributes["to"] not in DTYPES:
        raise UnsupportedError(f"to={attributes['to']}")


def find_converter(operator: str, version: int) -> Converter | None:
    """Ours for an operator of the default domain; None: onnx2torch's is used."""
    if operator == "Softmax" and version < 13:
        return Converter(_flat_softmax)
    if operator == "Resize" and version < 11:
        return Converter(upsample, host=(1,))
    if operator == "Pow" and version < 12:  # both of one type, and broadcast in an older way
        return None
    return _CONVERTERS.get(operator)


_CONVERTERS = {
    "AveragePool": Converter(onnx_windows.average_pool, check=onnx_windows.check_average_pool),
    "BatchNormalization": Converter(_batch_norm, check=_check_batch_norm),
    "Cast": Converter(_cast, check=_check_cast),
    "Clip": Converter(onnx_shapes.clip, host=(1, 2)),
    "Conv": Converter(onnx_windows.convolution),
    "ConvInteger": Converter(_convolve_integers),
    "ConvTranspose": Converter(
        onnx_windows.transposed_convolution, check=onnx_windows.check_transposed
    ),
    "CumSum": Converter(_cumulative_sum, host=(1,)),
    "DynamicQuantizeLinear": Converter(_quantize_dynamically, num_outputs=3),
    "Expand": Converter(onnx_shapes.expand, host=(1,)),
    "Flatten": Converter(onnx_shapes.flatten),
    "Gather": Converter(_gather),
    "Gelu": Converter(_gelu),
    "GlobalAveragePool": Converter(_global_average),
    "GlobalMaxPool": Converter(_global_max),
    "HardSigmoid": Converter(_hard_sigmoid),
    "InstanceNormalization": Converter(_instance_norm),
    "LayerNormalization": Converter(_layer_norm),
    "IsInf": Converter(_is_inf),
    "MaxPool": Converter(onnx_windows.max_pool, check=onnx_windows.check_max_pool),
    "Pad": Converter(onnx_shapes.pad, host=(1, 2, 3)),
    "Pow": Converter(_power),
    "ReduceMax": _reduction(torch.amax),
    "ReduceMean": _reduction(torch.mean),
    "ReduceMin": _reduction(torch.amin),
    "ReduceProd": _reduction(_prod),
    "ReduceSum": _reduction(_sum),
    "Reshape": Converter(onnx_shapes.reshape, host=(1,)),
    "Resize": Converter(resize, host=(1, 2, 3), check=check_resize),
    "Slice": Converter(onnx_shapes.slice_dims, host=(1, 2, 3, 4)),
    "Softmax": Converter(_softmax),
    "Split": Converter(onnx_shapes.split, host=(1,), num_outputs=None),
    "Squeeze": Converter(onnx_shapes.squeeze, host=(1,)),
    "Tile": Converter(onnx_shapes.tile, host=(1,)),
    "Upsample": Converter(upsample, host=(1,)),
    "Unsqueeze": Converter(onnx_shapes.unsqueeze, host=(1,)),
}
