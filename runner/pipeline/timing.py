"""How long a call takes on a device, for balancing stages."""

from collections.abc import Callable
from statistics import median

import torch
from torch import nn

from parallel.graph_stage import Value
from runner.compiler.rounds import Tensors, round_seconds
from runner.compiler.segment import TensorSpec, named_tensors

_GPU_CALLS = 8
"""Calls in one round on a GPU, where a part may take less than an event can tell."""


def call_seconds(
    run: Callable[..., object],
    given: Tensors,
    weights: Tensors,
    device: torch.device,
    *,
    captures: bool,
) -> float:
    """Of one call with activations and weights, which are on `device`.

    Args:
        captures: on a GPU, time CUDA graphs rather than calls.
    """
    if device.type == "cpu":
        # The shortest: what else the CPU does only adds to it.
        return min(round_seconds(run, [(*given, *weights)], device))
    sets = [(*given, *held) for held in _copies(weights, device)]
    return median(round_seconds(run, sets, device, captures=captures)) / len(sets)


def spec_of(value: Value) -> TensorSpec:
    return TensorSpec(value.shape, value.torch_dtype)


def random_of(value: Value, device: torch.device, generator: torch.Generator) -> torch.Tensor:
    """What a value may hold."""
    empty = spec_of(value).empty(device)
    if empty.is_floating_point():
        return empty.normal_(generator=generator)
    return empty.random_(0, 2, generator=generator)  # 0 and 1 are in range, whatever they index.


def weights_of(module: nn.Module, device: torch.device) -> Tensors:
    """What a module holds, contiguous and on `device`; the module's own stay where they are."""
    return tuple(t.detach().contiguous().to(device) for _, t in named_tensors(module))


def _copies(weights: Tensors, device: torch.device) -> list[Tensors]:
    """The weights of each call of a round.

    In a model they come from main memory; a few copies of small ones are not in the cache, either.
    """
    cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    if sum(tensor.nbytes for tensor in weights) > cache_bytes:
        return [weights] * _GPU_CALLS
    return [tuple(tensor.clone() for tensor in weights) for _ in range(_GPU_CALLS)]
