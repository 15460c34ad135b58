"""The hardware that compiled code is bound to, in one line each."""

import platform

import torch


def gpu_name(device: torch.device) -> str:
    """Such as "NVIDIA H200 sm90"."""
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name} sm{properties.major}{properties.minor}"


def cpu_isa() -> str:
    """Such as "x86_64 AVX512", as PyTorch sees it."""
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
