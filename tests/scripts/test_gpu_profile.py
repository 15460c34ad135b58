"""What runs beside what: of copies that last, the share in which a kernel ran."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
from processes import ROOT
from torch.autograd import DeviceType

sys.path.append(str(ROOT / "scripts"))

from gpu_profile import shares_beside_kernels


def event(name: str, start: float, end: float) -> SimpleNamespace:
    span = SimpleNamespace(start=start, end=end)
    return SimpleNamespace(device_type=DeviceType.CUDA, name=name, time_range=span)


def test_kernels_beside_one_another_count_once() -> None:
    events = [event("gemm", 0, 4), event("gemm", 2, 6), event("Memcpy DtoH", 3, 8)]
    recorded: Any = SimpleNamespace(events=lambda: events)
    assert shares_beside_kernels(recorded) == {"carries": 0, "copies": pytest.approx(3 / 5)}
