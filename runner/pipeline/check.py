"""Random inputs at given shapes."""

from collections.abc import Sequence

import torch

from parallel.graph_stage import Value


def random_inputs(inputs: Sequence[Value], *, seed: int = 0) -> list[torch.Tensor]:
    """Normal numbers, and integers that any table of two entries knows; on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    return [_random(value, generator) for value in inputs]


def _random(value: Value, generator: torch.Generator) -> torch.Tensor:
    dtype = value.torch_dtype
    if dtype.is_floating_point:
        return torch.randn(value.shape, generator=generator).to(dtype)
    return torch.randint(0, 2, value.shape, generator=generator).to(dtype)
