"""Where a job's measurement was made: its host, versions and devices."""

from typing import Any

import torch

from runner.bench.host import read_host
from runner.bench.measure import device_of
from runner.observe.nvml import read_inventory
from runner.observe.software import read_software
from runner.planning import DecoderJob


def read_environment(job: DecoderJob) -> dict[str, Any]:
    """Plain JSON types; null where something is not there or not known."""
    software = read_software()
    on_gpu = device_of(job).type == "cuda"
    return read_host() | {
        "torch": software.torch_version,
        "cuda": software.torch_cuda,
        "nccl": software.nccl_version,
        "tensorrt": software.distributions,
        "gpus": [torch.cuda.get_device_name(i) for i in job.plan.devices] if on_gpu else [],
        "driver": read_inventory().driver_version if on_gpu else None,
        "num_threads": torch.get_num_threads(),
    }
