"""What a device can do, on the CPU of this host."""

import torch

from runner.bench.measure import measure_limits


def test_limits_of_this_cpu_are_plausible() -> None:
    """Of the order that any machine has; a factor of a thousand would be a wrong unit."""
    limits = measure_limits(torch.device("cpu"), torch.float32)
    assert 1e8 < limits.read_bytes_per_s < 1e13
    assert 1e8 < limits.copy_bytes_per_s < 1e13
    assert 1e8 < limits.flops_per_s < 1e15
    assert limits.buffer_bytes == 2**28
