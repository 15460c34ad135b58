"""The GPUs of the ranks for Prometheus, under the names and labels of NVIDIA's dcgm-exporter."""

import os
import socket
from collections.abc import Callable, Iterator

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from runner.observe.gpu_monitor import GpuMonitor, gpus_of_ranks
from runner.observe.nvml import Gpu

_MIB = 2**20
_LABELS = ["gpu", "UUID", "pci_bus_id", "device", "modelName", "Hostname", "rank"]


def _used_bytes(gpu: Gpu) -> int | None:
    if gpu.memory_total_bytes is None or gpu.memory_free_bytes is None:
        return None
    return gpu.memory_total_bytes - gpu.memory_free_bytes


def _mib(num_bytes: int | None) -> int | None:
    return None if num_bytes is None else num_bytes // _MIB


_GAUGES: tuple[tuple[str, str, Callable[[Gpu], float | None]], ...] = (
    ("DCGM_FI_DEV_GPU_UTIL", "GPU utilization (in %).", lambda g: g.utilization_perc),
    (
        "DCGM_FI_DEV_MEM_COPY_UTIL",
        "Memory utilization (in %).",
        lambda g: g.memory_utilization_perc,
    ),
    ("DCGM_FI_DEV_FB_USED", "Memory used (in MiB).", lambda g: _mib(_used_bytes(g))),
    ("DCGM_FI_DEV_FB_FREE", "Memory free (in MiB).", lambda g: _mib(g.memory_free_bytes)),
    ("DCGM_FI_DEV_GPU_TEMP", "Temperature (in C).", lambda g: g.temperature_c),
    ("DCGM_FI_DEV_POWER_USAGE", "Power draw (in W).", lambda g: g.power_w),
    ("DCGM_FI_DEV_SM_CLOCK", "SM clock (in MHz).", lambda g: g.sm_clock_mhz),
    ("DCGM_FI_DEV_MEM_CLOCK", "Memory clock (in MHz).", lambda g: g.memory_clock_mhz),
    (
        "DCGM_FI_DEV_CLOCK_THROTTLE_REASONS",
        "Why clocks are low (NVML's bits).",
        lambda g: g.throttle_mask,
    ),
    (
        "DCGM_FI_DEV_ECC_SBE_VOL_TOTAL",
        "Corrected memory errors since the driver was loaded.",
        lambda g: g.ecc_corrected_errors,
    ),
    (
        "DCGM_FI_DEV_ECC_DBE_VOL_TOTAL",
        "Uncorrected memory errors since the driver was loaded.",
        lambda g: g.ecc_uncorrected_errors,
    ),
    (
        "DCGM_FI_DEV_NVLINK_CRC_FLIT_ERROR_COUNT_TOTAL",
        "NVLink flow-control CRC errors.",
        lambda g: g.nvlink_crc_errors,
    ),
    ("shardline_gpu_nvlinks_active", "NVLink links that are up.", lambda g: g.nvlinks_active),
    ("shardline_gpu_lost", "Whether the driver cannot reach the GPU.", lambda g: bool(g.fault)),
)


class GpuMetrics(Collector):
    """One gauge a rank of whatever its GPU and driver tell; none on a CPU."""

    def __init__(self, monitor: GpuMonitor, devices: tuple[int, ...]) -> None:
        """
        Args:
            devices: of each rank, as torch counts them; empty on a CPU.
        """
        self._monitor = monitor
        self._devices = devices
        self._known: dict[int, Gpu] = {}

    def gpus(self) -> dict[int, Gpu]:
        """The GPU of each rank that has one; where the driver answers nothing, all are lost."""
        inventory = self._monitor.read()
        if inventory.driver == "broken":
            return {
                rank: _lost(self._known.get(rank, Gpu(device)), inventory.reason)
                for rank, device in enumerate(self._devices)
            }
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        self._known = gpus_of_ranks(inventory.gpus, self._devices, visible)
        return self._known

    def describe(self) -> list[GaugeMetricFamily]:
        """Nothing is read when this is registered."""
        return []

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Read now; what a GPU does not tell is left out."""
        if not self._devices:
            return
        gpus, xids = self.gpus(), self._monitor.last_xids
        for name, says, value_of in _GAUGES:
            values = {rank: value_of(gpu) for rank, gpu in gpus.items()}
            yield _family(name, says, gpus, values)
        last: dict[int, float | None] = {rank: xids.get(gpu.index, 0) for rank, gpu in gpus.items()}
        says = "Value of the last XID error encountered; 0: none."
        yield _family("DCGM_FI_DEV_XID_ERRORS", says, gpus, last)


def _lost(known: Gpu, reason: str | None) -> Gpu:
    """What is still true of a GPU that cannot be asked any more."""
    return Gpu(
        known.index, uuid=known.uuid, pci_bus_id=known.pci_bus_id, name=known.name, fault=reason
    )


def _family(
    name: str, says: str, gpus: dict[int, Gpu], values: dict[int, float | None]
) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, says, labels=_LABELS)
    for rank, value in values.items():
        if value is not None:
            family.add_metric(_labels(rank, gpus[rank]), float(value))
    return family


def _labels(rank: int, gpu: Gpu) -> list[str]:
    index = str(gpu.index)
    named = [gpu.uuid or "", gpu.pci_bus_id or "", f"nvidia{index}", gpu.name or ""]
    return [index, *named, socket.gethostname(), str(rank)]
