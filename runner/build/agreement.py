"""How well what a layer adds agrees with what it should add.

In a half precision the state that a layer adds to is stored with errors of its own; some models
have a few states that are thousands of times larger than what a layer adds, and how well these
happen to be rounded says nothing. Each element's `rounding` is what it may be off because of that.
"""

import torch

from runner.config.schema import CompileConfig

LEAST_ERROR = 5e-4
"""What is never too large for the largest error of an element in float32, relative to the root mean
square of all: products whose factors keep 14 bits or more are within it, those in TF32, which keeps
11, are not (docs/measurements.md).
"""


def advice(
    config: CompileConfig, dtype: torch.dtype, device: torch.device, *, cosine: float
) -> str:
    """What may mend a comparison that failed, to be put behind its complaint; or nothing.

    Args:
        cosine: what was found; TF32 makes single elements wrong, but never the whole.
    """
    may_be_tf32 = (dtype, device.type, config.backend) == (torch.float32, "cuda", "tensorrt")
    if not may_be_tf32 or config.allow_tf32 or not cosine >= config.parity.min_cosine:
        return ""
    return (
        "; TensorRT-RTX multiplies float32 in TF32: set compile.allow_tf32 to true if that is good "
        "enough, or compile.backend to inductor, or model.dtype to bfloat16"
    )


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
