"""The norms of the families, rounding where the original models round."""

import torch
from torch import nn

from runner.models.config import DecoderConfig


class RMSNorm(nn.Module):
    """x / rms(x) * (offset + weight) over the last dim, in float32 inside.

    Llama rounds the normalized value to the dtype of x before it multiplies by the weight; Gemma,
    whose offset is 1, rounds once at the end.
    """

    def __init__(self, size: int, eps: float, *, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps
        self.offset = offset

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        if self.offset:
            return (normed * (self.offset + self.weight.float())).to(x.dtype)
        return self.weight * normed.to(x.dtype)


def make_norm(config: DecoderConfig, size: int) -> nn.Module:
    """The family's kind of norm over `size` features."""
    if config.norm == "layer":
        return nn.LayerNorm(size, eps=config.norm_eps)
    return RMSNorm(size, config.norm_eps, offset=1.0 if config.norm == "rms_plus_one" else 0.0)
