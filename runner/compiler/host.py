"""The hardware that compiled code is bound to."""

import platform

import torch


def gpu_name(device: torch.device) -> str:
    """Such as "NVIDIA H200 sm90"."""
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name} sm{properties.major}{properties.minor}"


def target_of(device: torch.device) -> str:
    """Compute capability as targets are called: "sm90"."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


def cpu_isa() -> str:
    """Architecture and the vector extension that torch uses, such as "x86_64 AVX512"."""
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def cpu_features() -> tuple[str, ...]:
    """The instruction sets of the processor; inductor compiles for all of them."""
    features = torch.cpu.get_capabilities()
    return tuple(sorted(name for name, value in features.items() if value is True))
