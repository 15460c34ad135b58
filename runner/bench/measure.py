"""What this rank's device can do: memory bandwidth and the rate of matrix products, measured."""

import time
from collections.abc import Callable

import torch

from runner.bench.floor import DeviceLimits
from runner.planning import DecoderJob

_BUFFER_BYTES = {"cuda": 4 * 2**30, "cpu": 2**28}
_MATMUL_SIZE = {"cuda": 8192, "cpu": 1024}
_CALLS = {"cuda": 5, "cpu": 1}
"""Between two looks at the clock, so that a GPU need not wait for the host after each."""
_DURATION_S = 0.5
_MIN_LOOKS = 3


def device_of(job: DecoderJob) -> torch.device:
    """The device of rank 0, in its process or another."""
    if job.device_type == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", job.plan.devices[0])


def measure_limits(device: torch.device, dtype: torch.dtype) -> DeviceLimits:
    """Takes about two seconds, and memory that the caller leaves free: two buffers of 4 GiB on a
    GPU, or less where there is less.
    """
    buffer_bytes = _BUFFER_BYTES[device.type]
    if device.type == "cuda":
        buffer_bytes = min(buffer_bytes, int(0.4 * torch.cuda.mem_get_info(device)[0]))
    size = _MATMUL_SIZE[device.type]
    read_bytes_per_s, copy_bytes_per_s = _bandwidths(buffer_bytes, device)
    limits = DeviceLimits(
        read_bytes_per_s=read_bytes_per_s,
        copy_bytes_per_s=copy_bytes_per_s,
        flops_per_s=_matmul_rate(size, device, dtype),
        buffer_bytes=buffer_bytes,
        matmul_size=size,
    )
    if device.type == "cuda":
        torch.cuda.empty_cache()  # The engine's memory is about to grow.
    return limits


def _bandwidths(buffer_bytes: int, device: torch.device) -> tuple[float, float]:
    """Of summing a buffer up, and of copying it to another one: there each byte counts twice."""
    source = torch.ones(buffer_bytes // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    read_s = _seconds(source.sum, device)
    copy_s = _seconds(lambda: target.copy_(source), device)
    return source.nbytes / read_s, 2 * source.nbytes / copy_s


def _matmul_rate(size: int, device: torch.device, dtype: torch.dtype) -> float:
    """Of random matrices: a GPU multiplies zeros with less power, and so faster."""
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / _seconds(lambda: left @ right, device)


def _seconds(call: Callable[[], torch.Tensor], device: torch.device) -> float:
    """The shortest time of one call; a limit is what was reached once."""
    calls = _CALLS[device.type]
    times: list[float] = []
    call()
    while len(times) < _MIN_LOOKS or sum(times) < _DURATION_S:
        _wait(device)
        started = time.perf_counter()
        for _ in range(calls):
            call()
        _wait(device)
        times.append(time.perf_counter() - started)
    return min(times) / calls


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
