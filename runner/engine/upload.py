"""Numbers of the host on their way to a device."""

from collections.abc import Sequence

import torch


def upload(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`x` on a device, without waiting for what the device is at."""
    if device.type == "cpu":
        return x
    return x.pin_memory().to(device, non_blocking=True)


def upload_list(
    values: Sequence[int] | Sequence[float], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """(len(values),) on a device, likewise."""
    return upload(torch.tensor(values, dtype=dtype), device)
