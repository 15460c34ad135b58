"""The GPUs of this host as the NVIDIA driver describes them, read through NVML into plain data.

Not here: any judgement of what was read (`gpu_checks`), nor CUDA; no context is created on a GPU.
"""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

from runner.observe.links import GpuPair, decode_p2p_status, decode_topology

# Enumerators of nvml.h. Written out because pynvml defines NVML_P2P_CAPS_INDEX_READ as a tuple.
_P2P_READ, _P2P_WRITE, _P2P_NVLINK = 0, 1, 2
_CLOCK_SM, _CLOCK_MEMORY = 1, 2
_TEMPERATURE_GPU = 0
_ECC_CORRECTED, _ECC_UNCORRECTED, _ECC_SINCE_DRIVER_LOAD = 0, 1, 0
_NVLINK_CRC_ERRORS = 2
_FEATURE_ENABLED = 1

_THROTTLE_REASONS = {
    0x1: "idle",
    0x2: "clock setting",
    0x4: "software power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
    0x100: "display clock setting",
    0x200: "board limit",
    0x400: "reliability limit",
}


@dataclass(frozen=True)
class Gpu:
    """One GPU. A field that this GPU or driver does not support is None.

    `fault` holds NVML's words where the driver counts the GPU but cannot open or reach it; every
    other field is None then. Errors of ECC count since the driver was loaded.
    """

    index: int
    fault: str | None = None
    uuid: str | None = None
    name: str | None = None
    pci_bus_id: str | None = None
    utilization_perc: int | None = None
    memory_utilization_perc: int | None = None
    memory_total_bytes: int | None = None
    memory_free_bytes: int | None = None
    compute_capability: tuple[int, int] | None = None
    sm_clock_mhz: int | None = None
    sm_clock_max_mhz: int | None = None
    memory_clock_mhz: int | None = None
    memory_clock_max_mhz: int | None = None
    throttle_mask: int | None = None
    throttle_reasons: tuple[str, ...] | None = None
    temperature_c: int | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
    ecc_corrected_errors: int | None = None
    ecc_uncorrected_errors: int | None = None
    row_remap_pending: bool | None = None
    row_remap_failed: bool | None = None
    mig_enabled: bool | None = None
    persistence_enabled: bool | None = None
    nvlinks_active: int | None = None
    nvlink_crc_errors: int | None = None


@dataclass(frozen=True)
class Inventory:
    """Every GPU that the driver shows to this process, or the reason why there is none.

    `driver` is "broken" where a driver is installed but does not answer, as in a container whose
    device permissions were lost. `cuda_version` is None where libcuda.so.1 cannot be loaded.
    """

    driver: Literal["present", "absent", "broken"]
    reason: str | None = None
    driver_version: str | None = None
    cuda_version: tuple[int, int] | None = None
    gpus: tuple[Gpu, ...] = ()
    pairs: tuple[GpuPair, ...] = ()


def read_inventory(*, with_pairs: bool = True) -> Inventory:
    """Ask the driver once about every GPU; takes some milliseconds a GPU, seconds on a cold one.

    Args:
        with_pairs: ask for the links between GPUs too, which do not change.
    """
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return _without_gpus(pynvml, error)
    try:
        return _read_all(_Driver(pynvml), with_pairs=with_pairs)
    finally:
        with suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def decode_throttle_reasons(mask: int) -> tuple[str, ...]:
    """The reasons why clocks are below their maximum, lowest bit first; an unknown bit as hex."""
    bits = [1 << position for position in range(mask.bit_length()) if mask >> position & 1]
    return tuple(_THROTTLE_REASONS.get(bit, f"reason {bit:#x}") for bit in bits)


def decode_cuda_version(number: int) -> tuple[int, int]:
    """CUDA's number for a version as (major, minor): `decode_cuda_version(12040) == (12, 4)`."""
    return number // 1000, number % 1000 // 10


class _Driver:
    """NVML's calls, answering None where the GPU, the driver or pynvml does not know the question.

    Attributes:
        faults: per GPU index, the words of NVML for a GPU that could not be opened.
    """

    def __init__(self, library: ModuleType) -> None:
        self._library = library
        self.faults: dict[int, str] = {}

    def ask(self, question: str, *args: Any) -> Any:
        function = getattr(self._library, f"nvml{question}", None)
        if function is None:
            return None
        try:
            return function(*args)
        except self._library.NVMLError:
            return None

    def open(self, index: int) -> Any:
        try:
            return self._library.nvmlDeviceGetHandleByIndex(index)
        except self._library.NVMLError as error:
            self.faults[index] = str(error)
            return None

    def why_lost(self, handle: Any) -> str | None:
        """NVML's words for a GPU that was there and is not: it fell off the bus, or the container
        lost its device.
        """
        library = self._library
        gone = (
            library.NVML_ERROR_GPU_IS_LOST,
            library.NVML_ERROR_NO_PERMISSION,
            library.NVML_ERROR_UNKNOWN,
        )
        try:
            library.nvmlDeviceGetMemoryInfo(handle)
        except library.NVMLError as error:
            return str(error) if error.value in gone else None
        return None

    @property
    def max_links(self) -> int:
        return int(self._library.NVML_NVLINK_MAX_LINKS)


def _without_gpus(pynvml: ModuleType, error: Any) -> Inventory:
    if error.value == pynvml.NVML_ERROR_LIBRARY_NOT_FOUND:
        return Inventory("absent", "no NVIDIA driver: libnvidia-ml.so.1 not found")
    if error.value == pynvml.NVML_ERROR_DRIVER_NOT_LOADED:
        return Inventory("absent", "no NVIDIA driver: libnvidia-ml.so.1 finds no kernel driver")
    return Inventory("broken", f"the NVIDIA driver does not answer: {error}")


def _read_all(driver: _Driver, *, with_pairs: bool) -> Inventory:
    count = driver.ask("DeviceGetCount") or 0
    handles = {index: driver.open(index) for index in range(count)}
    # The older call invents a version where libcuda.so.1 is missing; this one says so.
    cuda_number = driver.ask("SystemGetCudaDriverVersion_v2")
    return Inventory(
        driver="present",
        reason=None if count else "the NVIDIA driver shows no GPU",
        driver_version=driver.ask("SystemGetDriverVersion"),
        cuda_version=None if cuda_number is None else decode_cuda_version(cuda_number),
        gpus=tuple(_read_gpu(driver, index, handle) for index, handle in handles.items()),
        pairs=tuple(_read_pairs(driver, handles)) if with_pairs else (),
    )


def _read_gpu(driver: _Driver, index: int, handle: Any) -> Gpu:
    if handle is None:
        return Gpu(index, fault=driver.faults[index])
    if lost := driver.why_lost(handle):
        return Gpu(index, fault=lost)
    memory = driver.ask("DeviceGetMemoryInfo", handle)
    busy = driver.ask("DeviceGetUtilizationRates", handle)
    pci = driver.ask("DeviceGetPciInfo", handle)
    reasons = driver.ask("DeviceGetCurrentClocksEventReasons", handle)
    remapped = driver.ask("DeviceGetRemappedRows", handle)
    mig_modes = driver.ask("DeviceGetMigMode", handle)
    return Gpu(
        index,
        uuid=driver.ask("DeviceGetUUID", handle),
        name=driver.ask("DeviceGetName", handle),
        pci_bus_id=None if pci is None else pci.busId,
        utilization_perc=None if busy is None else busy.gpu,
        memory_utilization_perc=None if busy is None else busy.memory,
        memory_total_bytes=None if memory is None else memory.total,
        memory_free_bytes=None if memory is None else memory.free,
        compute_capability=driver.ask("DeviceGetCudaComputeCapability", handle),
        sm_clock_mhz=driver.ask("DeviceGetClockInfo", handle, _CLOCK_SM),
        sm_clock_max_mhz=driver.ask("DeviceGetMaxClockInfo", handle, _CLOCK_SM),
        memory_clock_mhz=driver.ask("DeviceGetClockInfo", handle, _CLOCK_MEMORY),
        memory_clock_max_mhz=driver.ask("DeviceGetMaxClockInfo", handle, _CLOCK_MEMORY),
        throttle_mask=reasons,
        throttle_reasons=None if reasons is None else decode_throttle_reasons(reasons),
        temperature_c=_read_temperature(driver, handle),
        power_w=_watts(driver.ask("DeviceGetPowerUsage", handle)),
        power_limit_w=_watts(driver.ask("DeviceGetEnforcedPowerLimit", handle)),
        ecc_corrected_errors=_count_ecc_errors(driver, handle, _ECC_CORRECTED),
        ecc_uncorrected_errors=_count_ecc_errors(driver, handle, _ECC_UNCORRECTED),
        row_remap_pending=None if remapped is None else bool(remapped[2]),
        row_remap_failed=None if remapped is None else bool(remapped[3]),
        mig_enabled=None if mig_modes is None else mig_modes[0] == _FEATURE_ENABLED,
        persistence_enabled=_enabled(driver.ask("DeviceGetPersistenceMode", handle)),
        nvlinks_active=_count_nvlinks(driver, handle),
        nvlink_crc_errors=_count_nvlink_errors(driver, handle),
    )


def _read_temperature(driver: _Driver, handle: Any) -> int | None:
    # Older drivers know only the older call, and CUDA 14 drops it.
    newer: int | None = driver.ask("DeviceGetTemperatureV", handle, _TEMPERATURE_GPU)
    if newer is not None:
        return newer
    older: int | None = driver.ask("DeviceGetTemperature", handle, _TEMPERATURE_GPU)
    return older


def _watts(milliwatts: int | None) -> float | None:
    return None if milliwatts is None else milliwatts / 1000


def _enabled(state: int | None) -> bool | None:
    return None if state is None else state == _FEATURE_ENABLED


def _count_nvlinks(driver: _Driver, handle: Any) -> int | None:
    states = [driver.ask("DeviceGetNvLinkState", handle, link) for link in range(driver.max_links)]
    known = [state for state in states if state is not None]
    return sum(state == _FEATURE_ENABLED for state in known) if known else None


def _count_nvlink_errors(driver: _Driver, handle: Any) -> int | None:
    counts = [
        driver.ask("DeviceGetNvLinkErrorCounter", handle, link, _NVLINK_CRC_ERRORS)
        for link in range(driver.max_links)
    ]
    known = [count for count in counts if count is not None]
    return sum(known) if known else None


def _count_ecc_errors(driver: _Driver, handle: Any, kind: int) -> int | None:
    count: int | None = driver.ask("DeviceGetTotalEccErrors", handle, kind, _ECC_SINCE_DRIVER_LOAD)
    return count


def _read_pairs(driver: _Driver, handles: dict[int, Any]) -> Iterable[GpuPair]:
    opened = [(index, handle) for index, handle in handles.items() if handle is not None]
    for position, (first, one) in enumerate(opened):
        for second, other in opened[position + 1 :]:
            level = driver.ask("DeviceGetTopologyCommonAncestor", one, other)
            yield GpuPair(
                first,
                second,
                read=_p2p(driver, one, other, _P2P_READ),
                write=_p2p(driver, one, other, _P2P_WRITE),
                nvlink=_p2p(driver, one, other, _P2P_NVLINK),
                topology=None if level is None else decode_topology(level),
            )


def _p2p(driver: _Driver, one: Any, other: Any, capability: int) -> str | None:
    status = driver.ask("DeviceGetP2PStatus", one, other, capability)
    return None if status is None else decode_p2p_status(status)
