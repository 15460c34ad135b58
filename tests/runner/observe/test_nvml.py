"""Reading GPUs through NVML: with no driver, with a stand-in driver library, and with a GPU."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from stand_in_driver import build_driver

from runner.observe.nvml import decode_cuda_version, decode_throttle_reasons, read_inventory

HAS_GPU = bool(read_inventory().gpus)
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="NVML shows no GPU")
needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")

# A driver library for pynvml to load: GPU 0 answers, GPU 1 opens and answers next to nothing,
# GPU 2 does not open. What is not defined here is what an old driver does not know.
DRIVER_SOURCE = r"""
#include <stdlib.h>
#include <string.h>
#define NOT_SUPPORTED 3
#define GPU_IS_LOST 15
#define FIRST(gpu) if ((long)(gpu) != 1) return NOT_SUPPORTED
typedef void *Gpu;
typedef struct { unsigned long long total, free, used; } Memory;
int nvmlInitWithFlags(unsigned flags) { const char *code = getenv("INIT"); return atoi(code); }
int nvmlShutdown(void) { return 0; }
int nvmlSystemGetDriverVersion(char *text, unsigned size) { strcpy(text, "580.10"); return 0; }
int nvmlSystemGetCudaDriverVersion_v2(int *version) { *version = 13010; return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 3; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, Gpu *gpu) {
    *gpu = (Gpu)(long)(index + 1);
    return index == 2 ? GPU_IS_LOST : 0;
}
int nvmlDeviceGetName(Gpu gpu, char *text, unsigned size) { strcpy(text, "Test GPU"); return 0; }
int nvmlDeviceGetMemoryInfo(Gpu gpu, Memory *memory) {
    FIRST(gpu);
    memory->total = 1000; memory->free = 900; memory->used = 100;
    return 0;
}
int nvmlDeviceGetCudaComputeCapability(Gpu gpu, int *major, int *minor) {
    FIRST(gpu);
    *major = 9; *minor = 0;
    return 0;
}
int nvmlDeviceGetClockInfo(Gpu gpu, unsigned type, unsigned *mhz) {
    FIRST(gpu);
    *mhz = type == 1 ? 345 : type == 2 ? 2619 : 0;
    return 0;
}
int nvmlDeviceGetCurrentClocksEventReasons(Gpu gpu, unsigned long long *reasons) {
    FIRST(gpu);
    *reasons = 0x41;
    return 0;
}
int nvmlDeviceGetTemperature(Gpu gpu, unsigned sensor, unsigned *celsius) {
    FIRST(gpu);
    *celsius = 31;
    return 0;
}
int nvmlDeviceGetPowerUsage(Gpu gpu, unsigned *milliwatts) {
    FIRST(gpu);
    *milliwatts = 75500;
    return 0;
}
int nvmlDeviceGetTotalEccErrors(Gpu gpu, unsigned type, unsigned kind, unsigned long long *count) {
    FIRST(gpu);
    *count = type == 1 && kind == 0 ? 4 : 99;
    return 0;
}
int nvmlDeviceGetRemappedRows(
    Gpu gpu, unsigned *corrected, unsigned *uncorrected, unsigned *pending, unsigned *failed
) {
    FIRST(gpu);
    *corrected = *uncorrected = 7; *pending = 1; *failed = 0;
    return 0;
}
int nvmlDeviceGetMigMode(Gpu gpu, unsigned *current, unsigned *pending) {
    FIRST(gpu);
    *current = 0; *pending = 1;
    return 0;
}
int nvmlDeviceGetPersistenceMode(Gpu gpu, unsigned *state) { FIRST(gpu); *state = 1; return 0; }
int nvmlDeviceGetNvLinkState(Gpu gpu, unsigned link, unsigned *active) {
    FIRST(gpu);
    if (link >= 6) return NOT_SUPPORTED;
    *active = link < 4;
    return 0;
}
int nvmlDeviceGetP2PStatus(Gpu one, Gpu other, unsigned capability, unsigned *status) {
    if (capability > 2) return NOT_SUPPORTED;
    *status = capability == 2 ? 5 : 0;
    return 0;
}
int nvmlDeviceGetTopologyCommonAncestor(Gpu one, Gpu other, unsigned *level) {
    *level = 30;
    return 0;
}
"""

READ = (
    "import dataclasses, json, runner.observe.nvml as nvml;"
    "print(json.dumps(dataclasses.asdict(nvml.read_inventory())))"
)


@pytest.fixture(scope="module")
def driver_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the stand-in libnvidia-ml.so.1."""
    return build_driver(tmp_path_factory.mktemp("driver"), DRIVER_SOURCE)


def read_with(driver_dir: Path, *, init: int) -> dict[str, Any]:
    """The inventory that a process sees whose NVML is the stand-in."""
    environment = {**os.environ, "LD_LIBRARY_PATH": str(driver_dir), "INIT": str(init)}
    command = [sys.executable, "-c", READ]
    done = subprocess.run(
        command, env=environment, cwd=Path(__file__).parents[3], capture_output=True, check=True
    )
    inventory: dict[str, Any] = json.loads(done.stdout)
    return inventory


def test_throttle_reasons_become_words() -> None:
    assert decode_throttle_reasons(0) == ()
    assert decode_throttle_reasons(0x1) == ("idle",)
    assert decode_throttle_reasons(0xC8) == (
        "hardware slowdown",
        "hardware thermal slowdown",
        "hardware power brake",
    )
    assert decode_throttle_reasons(1 << 20 | 0x4) == ("software power cap", "reason 0x100000")


def test_throttle_bits_are_those_of_the_header() -> None:
    import pynvml

    assert decode_throttle_reasons(pynvml.nvmlClocksEventReasonSwPowerCap) == (
        "software power cap",
    )
    assert decode_throttle_reasons(pynvml.nvmlClocksEventReasonHwThermalSlowdown) == (
        "hardware thermal slowdown",
    )


def test_cuda_versions_are_split() -> None:
    assert decode_cuda_version(12040) == (12, 4)
    assert decode_cuda_version(13000) == (13, 0)


@pytest.mark.skipif(
    Path("/proc/driver/nvidia").exists() or HAS_GPU, reason="this host has an NVIDIA driver"
)
def test_a_host_without_a_driver_has_an_empty_inventory_and_a_reason() -> None:
    inventory = read_inventory()
    assert inventory.driver == "absent"
    assert inventory.reason == "no NVIDIA driver: libnvidia-ml.so.1 not found"
    assert inventory.gpus == ()
    assert inventory.pairs == ()


@needs_compiler
def test_a_driver_that_answers(driver_dir: Path) -> None:
    inventory = read_with(driver_dir, init=0)
    assert inventory["driver"] == "present"
    assert inventory["reason"] is None
    assert (inventory["driver_version"], inventory["cuda_version"]) == ("580.10", [13, 1])
    assert inventory["gpus"][0] == {
        "index": 0,
        "fault": None,
        "uuid": None,
        "name": "Test GPU",
        "pci_bus_id": None,
        "utilization_perc": None,
        "memory_utilization_perc": None,
        "memory_total_bytes": 1000,
        "memory_free_bytes": 900,
        "compute_capability": [9, 0],
        "sm_clock_mhz": 345,
        "sm_clock_max_mhz": None,
        "memory_clock_mhz": 2619,
        "memory_clock_max_mhz": None,
        "throttle_mask": 0x41,
        "throttle_reasons": ["idle", "hardware thermal slowdown"],
        "temperature_c": 31,
        "power_w": 75.5,
        "power_limit_w": None,
        "ecc_corrected_errors": 99,
        "ecc_uncorrected_errors": 4,
        "row_remap_pending": True,
        "row_remap_failed": False,
        "mig_enabled": False,
        "persistence_enabled": True,
        "nvlinks_active": 4,
        "nvlink_crc_errors": None,
    }


@needs_compiler
def test_what_a_gpu_does_not_support_is_none(driver_dir: Path) -> None:
    _, silent, lost = read_with(driver_dir, init=0)["gpus"]
    told = {name for name, value in silent.items() if value is not None}
    assert told == {"index", "name"}
    assert lost["fault"] == "GPU is lost"
    assert {name for name, value in lost.items() if value is not None} == {"index", "fault"}


@needs_compiler
def test_only_gpus_that_open_are_paired(driver_dir: Path) -> None:
    assert read_with(driver_dir, init=0)["pairs"] == [
        {
            "first": 0,
            "second": 1,
            "read": "ok",
            "write": "ok",
            "nvlink": "not supported",
            "topology": "PCIe host bridge",
        }
    ]


@needs_compiler
@pytest.mark.parametrize(
    ("init", "driver", "words"),
    [
        (9, "absent", "finds no kernel driver"),
        (18, "broken", "version mismatch"),
        (999, "broken", "Unknown Error"),
    ],
)
def test_a_driver_that_does_not_start(driver_dir: Path, init: int, driver: str, words: str) -> None:
    inventory = read_with(driver_dir, init=init)
    assert inventory["driver"] == driver
    assert words in inventory["reason"]
    assert inventory["gpus"] == []


@pytest.mark.gpu
@needs_gpu
def test_a_real_gpu_is_described() -> None:
    inventory = read_inventory()
    gpu = inventory.gpus[0]
    assert inventory.driver == "present"
    assert gpu.fault is None
    assert gpu.name
    assert gpu.uuid is not None
    assert gpu.uuid.startswith("GPU-")
    assert 0 < (gpu.memory_free_bytes or 0) <= (gpu.memory_total_bytes or 0)
    assert len(inventory.pairs) == len(inventory.gpus) * (len(inventory.gpus) - 1) // 2
    json.dumps(dataclasses.asdict(inventory))
