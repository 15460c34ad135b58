"""How well what a layer adds agrees with what it should add.

In a half precision the state that a layer adds to is stored with errors of its own; some models
have a few states that are thousands of times larger than what a layer adds, and how well these
happen to be rounded says nothing. Each element's `rounding` is what it may be off because of that.
"""

import torch

LEAST_ERROR = 5e-4
"""What is never too large for the largest error of an element in float32. TensorRT-RTX multiplies
matrices with errors of up to 1e-4 of a result's norm, of which the largest is some five times that;
cuBLAS has some 1e-7 of the norm, and `disable_tf32` changes nothing. Products in TF32 are off by
1.4e-3 and more, and are refused (docs/measurements.md).
"""


def errors_of(
    found: torch.Tensor, wanted: torch.Tensor, *, rounding: torch.Tensor
) -> tuple[float, float]:
    """The largest error of any element, relative to the root mean square of `wanted`.

    Args:
        rounding: what each element may be off because of the state that it is added to. Some
            models have a few states that are thousands of times larger than what a layer adds;
            how well these happen to be rounded says nothing.

    Returns:
        The error, and the error beyond the rounding.
    """
    scale = wanted.pow(2).mean().sqrt().clamp_min(torch.finfo(wanted.dtype).tiny)
    off = (found - wanted).abs()
    return (off.max() / scale).item(), ((off - rounding).max() / scale).item()


def cosine_of(found: torch.Tensor, wanted: torch.Tensor, *, rounding: torch.Tensor) -> float:
    """The cosine of all elements together, where those within `rounding` count as right."""
    settled = torch.where((found - wanted).abs() <= rounding, wanted, found)
    return torch.cosine_similarity(settled.flatten(), wanted.flatten(), dim=0).item()


def gain_of(found: torch.Tensor, wanted: torch.Tensor, *, rounding: torch.Tensor) -> float:
    """How long `found` is along `wanted`: 1 where it is right, 1.1 where all of it is a tenth too
    large. Rounding averages out; elements whose rounding exceeds most of `wanted` are left out.
    """
    told = rounding <= wanted.abs().median()
    if not told.any():
        return 1.0
    found, wanted = found[told], wanted[told]
    return ((found * wanted).sum() / (wanted * wanted).sum()).item()
