"""How inductor times the kernels between which it chooses on a GPU: in a CUDA graph, as they run.

Inductor itself launches a kernel between two events. Where the host is busy, as it is when several
builds run at once, what lies between these is the time of a launch, and of kernels that take a few
microseconds any may win.
"""

from collections.abc import Callable
from statistics import fmean

import torch

WAY = "graphs"
"""What artefacts depend on of this."""

_NUM_CALLS = 20
_CACHES = 2
"""As many bytes are read before each call as this many of the GPU's caches hold."""


def use_graphs() -> None:
    """Have inductor time kernels so in this process, where it builds on a stream of its own."""
    from torch._inductor.runtime.benchmarking import register_benchmarker

    register_benchmarker("cuda", _milliseconds, override=True)


def _milliseconds(benchmarker: object, call: Callable[[], object], **options: object) -> float:
    """Of one call whose inputs are in memory, not in the GPU's cache: the mean of the faster half
    of several, since other processes may hold up the others.

    Args:
        benchmarker: inductor's own.
        call: launches the kernel on the current stream.
        options: what inductor's own would be told.
    """
    stream = torch.cuda.current_stream()
    if stream == torch.cuda.default_stream():  # Which no graph can be captured on.
        milliseconds: float = benchmarker.benchmark_gpu(call, device_type="cuda", **options)  # type: ignore[attr-defined]
        return milliseconds
    cache_bytes = torch.cuda.get_device_properties(stream.device).L2_cache_size
    other = torch.zeros(int(_CACHES * cache_bytes) // 4, device=stream.device)
    events = [(_recorded_by_a_node(), _recorded_by_a_node()) for _ in range(_NUM_CALLS)]
    try:
        call()  # What it loads cannot be loaded while a graph is captured.
    except Exception as error:
        if "invalid configuration" in str(error).lower():
            return float("inf")  # As inductor's own does: it takes another.
        raise
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        for start, end in events:
            other.sum()
            start.record()
            call()
            end.record()
    graph.replay()
    stream.synchronize()
    times = sorted(start.elapsed_time(end) for start, end in events)
    return fmean(times[: _NUM_CALLS // 2])


def _recorded_by_a_node() -> torch.cuda.Event:
    """An event that is recorded whenever the graph runs."""
    return torch.cuda.Event(enable_timing=True, external=True)  # type: ignore[no-untyped-call]
