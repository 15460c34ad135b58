"""The rotary embedding of a GGUF file as transformers' `rope_parameters`.

GGUF holds the scaling of Llama 3.1 as a table of divisors, not as the four numbers it came from.
They are taken back only where they reproduce the table. Not here: anything but RoPE.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from parallel.errors import ConfigError
from runner.importer.gguf_file import GgufFile

if TYPE_CHECKING:
    import numpy as np

# The tensor with one divisor for each pair of a head's channels: (head_dim / 2,).
ROPE_FACTORS = "rope_freqs.weight"

# The constants of every Llama 3.1, 3.2 and 3.3; `factor` differs among them.
_LOW_FREQ_FACTOR = 1.0
_HIGH_FREQ_FACTOR = 4.0
_ORIGINAL_CONTEXT = 8192


def rope_parameters(file: GgufFile, *, head_dim: int) -> dict[str, Any]:
    """The `rope_parameters` of config.json.

    Raises:
        ConfigError: a kind of scaling other than none, linear or that of Llama 3, or two at once.
    """
    theta = file.get("llama.rope.freq_base", float) or 10000.0
    scaling = _metadata_scaling(file)
    factors = file.dequantize(ROPE_FACTORS) if ROPE_FACTORS in file.tensor_shapes else None
    if factors is None or bool((factors == 1).all()):
        return {**scaling, "rope_theta": theta}
    if scaling["rope_type"] != "default":
        raise ConfigError(f"{file.path}: has both {ROPE_FACTORS} and {scaling['rope_type']} RoPE")
    return {**_llama3_scaling(file, factors, head_dim, theta), "rope_theta": theta}


def llama3_factors(
    *, head_dim: int, theta: float, factor: float, original_context: int
) -> np.ndarray:
    """What Llama 3.1 divides each rotary frequency by: (head_dim / 2,), float64.

    Wavelengths up to original_context / 4 stay, those from original_context / 1 are stretched by
    `factor`, and those between are blended (the formula of Meta's `apply_scaling`).
    """
    import numpy as np

    frequencies = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    turns = original_context * frequencies / (2 * math.pi)
    kept = (turns - _LOW_FREQ_FACTOR) / (_HIGH_FREQ_FACTOR - _LOW_FREQ_FACTOR)
    kept = kept.clip(0.0, 1.0)
    return 1.0 / ((1.0 - kept) / factor + kept)


def _metadata_scaling(file: GgufFile) -> dict[str, Any]:
    kind = file.get("llama.rope.scaling.type", str) or "none"
    # `scale_linear` is the name that files of 2023 use, without a type.
    legacy_factor = file.get("llama.rope.scale_linear", float)
    factor = file.get("llama.rope.scaling.factor", float) or legacy_factor or 1.0
    if kind == "linear" or (kind == "none" and legacy_factor is not None):
        return {"rope_type": "linear", "factor": factor}
    if kind != "none":
        raise ConfigError(
            f"{file.path}: RoPE scaling {kind!r} is not supported; use a model with none, linear "
            "or Llama 3 scaling"
        )
    return {"rope_type": "default"}


def _llama3_scaling(
    file: GgufFile, factors: np.ndarray, head_dim: int, theta: float
) -> dict[str, Any]:
    import numpy as np

    stated_context = file.get("llama.rope.scaling.original_context_length", int)
    original_context = stated_context or _ORIGINAL_CONTEXT
    factor = float(f"{factors.max():.6g}")
    expected = llama3_factors(
        head_dim=head_dim, theta=theta, factor=factor, original_context=original_context
    )
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-3):
        raise ConfigError(
            f"{file.path}: the RoPE divisors in {ROPE_FACTORS} are not those of Llama 3.1 to 3.3 "
            f"(factor {factor:g}, original context {original_context}), and config.json cannot "
            "hold another table; start from the model's safetensors instead"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": _LOW_FREQ_FACTOR,
        "high_freq_factor": _HIGH_FREQ_FACTOR,
        "original_max_position_embeddings": original_context,
    }
