"""How long a call takes on a device, for balancing stages."""

import time
from collections.abc import Callable, Sequence
from statistics import median

import torch

from parallel.graph_stage import Value
from runner.compiler.segment import TensorSpec

Tensors = tuple[torch.Tensor, ...]

_ROUNDS = 7
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
        return _cpu_seconds(run, (*given, *weights))
    sets = [(*given, *held) for held in _copies(weights, device)]
    return _gpu_seconds(run, sets, device, captures=captures)


def spec_of(value: Value) -> TensorSpec:
    return TensorSpec(value.shape, value.torch_dtype)


def random_of(value: Value, device: torch.device, generator: torch.Generator) -> torch.Tensor:
    """What a value may hold."""
    empty = spec_of(value).empty(device)
    if empty.is_floating_point():
        return empty.normal_(generator=generator)
    return empty.random_(0, 2, generator=generator)  # 0 and 1 are in range, whatever they index.


def _copies(weights: Tensors, device: torch.device) -> list[Tensors]:
    """The weights of each call of a round.

    In a model they come from main memory; a few copies of small ones are not in the cache, either.
    """
    cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    if sum(tensor.nbytes for tensor in weights) > cache_bytes:
        return [weights] * _GPU_CALLS
    return [tuple(tensor.clone() for tensor in weights) for _ in range(_GPU_CALLS)]


def _cpu_seconds(run: Callable[..., object], arguments: Tensors) -> float:
    """The shortest time of a call: what else the CPU does only adds to it."""
    seconds = []
    for _ in range(_ROUNDS + 1):
        started = time.perf_counter()
        run(*arguments)
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])


def _gpu_seconds(
    run: Callable[..., object], sets: Sequence[Tensors], device: torch.device, *, captures: bool
) -> float:
    """The median time of a call; with `captures` without the host's share."""

    def call() -> None:
        for arguments in sets:
            run(*arguments)

    with torch.cuda.device(device):
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()
        torch.cuda.synchronize()
        if captures:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                call()
        seconds: list[float] = []
        for _ in range(_ROUNDS + 1):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            if captures:
                graph.replay()
            else:
                call()
            end.record()
            end.synchronize()
            seconds.append(start.elapsed_time(end) / 1e3)
    return median(seconds[1:]) / len(sets)
