"""Rotary position embeddings: the inverse frequencies of every scaling that the supported configs
use.

The formulas are those of transformers' `modeling_rope_utils` (version 5), which the tests compare
with. Where transformers changes its frequencies with the length of the batch at hand (longrope and
dynamic), a sequence has two *variants* here: 0 up to the original length and 1 beyond it; the
engine recomputes a sequence when it crosses over, so all keys of a sequence are of one kind.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from runner.models.rope_config import RopeConfig


def frequencies(rope: RopeConfig, max_model_len: int) -> tuple[torch.Tensor, float]:
    """Inverse frequencies and the factor on cos and sin.

    Args:
        max_model_len: the length in tokens that variant 1 of `dynamic` is made for.

    Returns:
        (variants, rotary_dim / 2) float32 on the CPU, radians per position; and the factor.
    """
    return _KINDS[rope.kind](rope, max_model_len)


def _wavelengths(rope: RopeConfig, theta: float) -> torch.Tensor:
    """theta to the power of 2i / rotary_dim."""
    exponents = torch.arange(0, rope.rotary_dim, 2, dtype=torch.float32) / rope.rotary_dim
    return theta**exponents


def _default(rope: RopeConfig, max_model_len: int) -> tuple[torch.Tensor, float]:
    del max_model_len
    return 1.0 / _wavelengths(rope, rope.parameters["rope_theta"])[None], 1.0


def _linear(rope: RopeConfig, max_model_len: int) -> tuple[torch.Tensor, float]:
    plain, factor = _default(rope, max_model_len)
    return plain / rope.parameters["factor"], factor


def _dynamic(rope: RopeConfig, max_model_len: int) -> tuple[torch.Tensor, float]:
    theta, factor, dim = rope.parameters["rope_theta"], rope.factor, rope.rotary_dim
    longest = max(max_model_len, rope.max_positions)
    stretch = factor * longest / rope.max_positions - (factor - 1)
    stretched = theta * stretch ** (dim / (dim - 2))
    return 1.0 / torch.stack([_wavelengths(rope, theta), _wavelengths(rope, stretched)]), 1.0


def _llama3(rope: RopeConfig, max_model_len: int) -> tuple[torch.Tensor, float]:
    """Long wavelengths are divided by the factor, short ones kept, those between interpolated."""
    plain, _ = _default(rope, max_model_len)
    low, high = rope.parameters["low_freq_factor"], rope.parameters["high_freq_factor"]
    turns = rope.original_positions * plain / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - keep) * plain / rope.parameters["factor"] + keep * plain, 1.0


def _yarn(rope: RopeConfig, max_model_len: int) -> tuple[torch.Tensor, float]:
    plain, _ = _default(rope, max_model_len)
    given, factor = rope.parameters, rope.factor
    fast = _turning_dim(rope, given.get("beta_fast") or 32)
    slow = _turning_dim(rope, given.get("beta_slow") or 1)
    if given.get("truncate", True):
        fast, slow = math.floor(fast), math.ceil(slow)
    fast, slow = max(fast, 0), min(slow, rope.rotary_dim - 1)
    steps = torch.arange(rope.rotary_dim // 2, dtype=torch.float32) - fast
    keep = 1 - (steps / ((slow - fast) or 0.001)).clamp(0, 1)
    return (1 - keep) * plain / factor + keep * plain, _yarn_scale(given, factor)


def _turning_dim(rope: RopeConfig, turns: float) -> float:
    """The dim, in pairs, whose wave makes `turns` turns within the original length."""
    ratio = math.log(rope.original_positions / (turns * 2 * math.pi))
    return rope.rotary_dim * ratio / (2 * math.log(rope.parameters["rope_theta"]))


def _yarn_scale(given: Mapping[str, Any], factor: float) -> float:
    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if given.get("attention_factor") is not None:
        return float(given["attention_factor"])
    if given.get("mscale") and given.get("mscale_all_dim"):
        return scale(given["mscale"]) / scale(given["mscale_all_dim"])
    return scale(1.0)


def _longrope(rope: RopeConfig, max_model_len: int) -> tuple[torch.Tensor, float]:
    del max_model_len
    given, factor = rope.parameters, rope.factor
    short, long = (
        torch.tensor(given[k], dtype=torch.float32) for k in ("short_factor", "long_factor")
    )
    waves = _wavelengths(rope, given["rope_theta"])
    scale = given.get("attention_factor")
    if scale is None:
        spread = math.log(factor) / math.log(rope.original_positions) if factor > 1 else 0.0
        scale = math.sqrt(1 + spread)
    return 1.0 / torch.stack([short * waves, long * waves]), float(scale)


_KINDS: Mapping[str, Callable[[RopeConfig, int], tuple[torch.Tensor, float]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}


def cos_sin(
    inverse_frequencies: torch.Tensor,
    scale: float,
    positions: torch.Tensor,
    variants: torch.Tensor,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rotation of every token.

    Args:
        inverse_frequencies: (variants, rotary_dim / 2) float32.
        positions, variants: (num_tokens,) int64.

    Returns:
        cos and sin, each (num_tokens, 1, rotary_dim / 2) of `dtype`.
    """
    angles = positions[:, None].float() * inverse_frequencies[variants]
    return tuple((scale * f(angles)).to(dtype)[:, None] for f in (torch.cos, torch.sin))  # type: ignore[return-value]


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the first dims of x: (num_tokens, num_heads, head_dim); the halves are the pairs."""
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)
