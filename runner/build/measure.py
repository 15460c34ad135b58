"""How long a compiled segment takes, and how far it is off, on random activations.

Weights are the segment's own where it holds any, and random where it knows only their shapes. They
come from main memory, as they do in a model: as many sets of inputs are cycled through as
do not fit into the cache.
"""

import math
from dataclasses import dataclass
from statistics import median

import torch

from runner.build.agreement import LEAST_ERROR
from runner.build.tf32 import products_in_tf32
from runner.build.widening import run_widened, wider_than
from runner.compiler.backend import Compiled
from runner.compiler.rounds import round_seconds
from runner.compiler.segment import Segment, TensorSpec, named_tensors

Inputs = tuple[torch.Tensor, ...]

_CACHE_SHARE = 4
"""Inputs of so many times the size of the cache are cycled through."""
_MAX_SETS = 16
_CPU_CACHE_BYTES = 64 * 2**20
_MAX_OTHER = 0.01
"""Share of the elements of an integer output, such as labels, that rounding may change."""


@dataclass(frozen=True)
class Samples:
    """Inputs of a segment, and what it makes of the first of them.

    Attributes:
        inputs: several sets, each in the order of `Segment.inputs`.
        exact: outputs in full precision for `inputs[0]`.
        eager_error: the error of PyTorch's kernels in the segment's own dtype, with products in
            TF32 where they may be.
    """

    inputs: tuple[Inputs, ...]
    exact: tuple[torch.Tensor, ...]
    eager_error: float

    @classmethod
    @torch.inference_mode()
    def draw(cls, segment: Segment, device: torch.device, *, allow_tf32: bool = False) -> "Samples":
        """Inputs that are equal in every run."""
        generator = torch.Generator(device).manual_seed(0)
        num_bytes = sum(s.empty("meta").nbytes for s in segment.inputs)
        sets = min(_MAX_SETS, 1 + _CACHE_SHARE * _cache_bytes(device) // max(1, num_bytes))
        inputs = tuple(_draw(segment, device, generator) for _ in range(max(2, sets)))
        floating = (s.dtype for s in segment.inputs if s.dtype.is_floating_point)
        dtype = next(floating, torch.float32)
        run = segment.function()
        exact = tuple(run_widened(run, inputs[0], wider_than(dtype)))
        with products_in_tf32(allow_tf32):
            eager = error_of(tuple(run(*inputs[0])), exact)
        floor = max(4 * torch.finfo(dtype).eps, LEAST_ERROR / 4)
        return cls(inputs, exact, max(eager, floor))

    @torch.inference_mode()
    def error_ratio(self, run: Compiled) -> float:
        """The error of a compiled form as a multiple of that of eager."""
        error = error_of(run(*self.inputs[0]), self.exact)
        # Where eager's own numbers overflow, both are infinite.
        return 1.0 if error == self.eager_error else error / self.eager_error


def error_of(outputs: tuple[torch.Tensor, ...], exact: tuple[torch.Tensor, ...]) -> float:
    """The largest error of any output, relative to the root mean square of that output.

    Where the exact number is not finite, such as the root of a random negative one, any is right.
    """
    errors = [_error_of(o, e) for o, e in zip(outputs, exact, strict=True)]
    # Of a list that holds a NaN, max returns whatever comes first.
    return float("inf") if any(map(math.isnan, errors)) else max(errors, default=0.0)


def _error_of(output: torch.Tensor, exact: torch.Tensor) -> float:
    if not exact.is_floating_point():
        share = (output != exact).float().mean().item() if exact.numel() else 0.0
        return max(0.0, share - _MAX_OTHER)
    told = exact.isfinite()
    off, exact = (output.to(exact.dtype) - exact)[told], exact[told]
    if not exact.numel():
        return 0.0
    return (off.abs().max() / exact.pow(2).mean().sqrt().clamp_min(1e-30)).item()


@torch.inference_mode()
def microseconds(run: Compiled, inputs: tuple[Inputs, ...]) -> float:
    """The median time of a call; on a GPU inside a CUDA graph, so without the host's share."""
    device = next((x.device for x in inputs[0]), torch.device("cpu"))
    return median(round_seconds(run, inputs, device)) / len(inputs) * 1e6


def _draw(segment: Segment, device: torch.device, generator: torch.Generator) -> Inputs:
    activations = [_normal(s, device, generator, 1.0) for s in segment.activations]
    held = {name: tensor for name, tensor in named_tensors(segment.module) if not tensor.is_meta}
    weights = [
        # A variance that is drawn may be negative, an index out of its range.
        _copy(held[name], device) if name in held else _random_weight(spec, device, generator)
        for name, spec in segment.weights.items()
    ]
    return (*activations, *weights)


def _copy(weight: torch.Tensor, device: torch.device) -> torch.Tensor:
    return weight.detach().clone(memory_format=torch.contiguous_format).to(device)


def _random_weight(
    spec: TensorSpec, device: torch.device, generator: torch.Generator
) -> torch.Tensor:
    if len(spec.shape) > 1:
        return _normal(spec, device, generator, 0.02)
    return spec.empty(device).fill_(1.0)


def _normal(
    spec: TensorSpec, device: torch.device, generator: torch.Generator, std: float
) -> torch.Tensor:
    if not spec.dtype.is_floating_point:
        # Whatever an index may be, 0 and 1 are in range.
        return spec.empty(device).random_(0, 2, generator=generator)
    return spec.empty(device).normal_(0.0, std, generator=generator)


def _cache_bytes(device: torch.device) -> int:
    if device.type == "cpu":
        return _CPU_CACHE_BYTES
    return int(torch.cuda.get_device_properties(device).L2_cache_size)
