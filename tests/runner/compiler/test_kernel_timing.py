"""What inductor learns of a kernel, on a host that takes its time to launch it."""

import time

import pytest
import torch

from runner.compiler import kernel_timing
from runner.compiler.kernel_timing import use_graphs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

LAUNCH_S = 2e-3
MIB = 2**20


def milliseconds(num_bytes: int) -> float:
    """Of adding up so many, as inductor would be told."""
    from torch._inductor.runtime.benchmarking import benchmarker

    x = torch.zeros(num_bytes // 4, device="cuda")

    def call() -> None:
        time.sleep(LAUNCH_S)
        x.sum()

    use_graphs()
    with torch.cuda.stream(torch.cuda.Stream()):
        return benchmarker.benchmark(fn=call, device="cuda", rep=40, is_vetted_benchmarking=True)


def test_a_slow_host_does_not_count() -> None:
    assert milliseconds(MIB) < 1e3 * LAUNCH_S / 10


def test_what_is_read_is_not_in_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is read between two calls it is, and comes sooner."""
    from_memory = milliseconds(16 * MIB)
    monkeypatch.setattr(kernel_timing, "_CACHES", 1e-3)
    assert milliseconds(16 * MIB) < 0.95 * from_memory


def test_what_cannot_be_launched_is_left_out() -> None:
    def call() -> None:
        raise RuntimeError("CUDA error: invalid configuration argument")

    with torch.cuda.stream(torch.cuda.Stream()):
        assert kernel_timing._milliseconds(None, call) == float("inf")
