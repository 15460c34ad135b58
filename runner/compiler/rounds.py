"""How long calls take on a device."""

import time
from collections.abc import Callable, Sequence

import torch

Tensors = tuple[torch.Tensor, ...]

_ROUNDS = 7


def round_seconds(
    run: Callable[..., object],
    inputs: Sequence[Tensors],
    device: torch.device,
    *,
    captures: bool = True,
) -> list[float]:
    """Of rounds of one call with each of the inputs, after a first round that does not count.

    Args:
        inputs: on `device`.
        captures: a round on a GPU is a CUDA graph, so without the host's share.
    """

    def call() -> None:
        for arguments in inputs:
            run(*arguments)

    return (_on_cpu(call) if device.type == "cpu" else _on_gpu(call, device, captures))[1:]


def _on_cpu(call: Callable[[], None]) -> list[float]:
    seconds = []
    for _ in range(_ROUNDS + 1):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return seconds


def _on_gpu(call: Callable[[], None], device: torch.device, captures: bool) -> list[float]:
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
            call = graph.replay
        seconds: list[float] = []
        for _ in range(_ROUNDS + 1):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            call()
            end.record()
            end.synchronize()
            seconds.append(start.elapsed_time(end) / 1e3)
    return seconds
