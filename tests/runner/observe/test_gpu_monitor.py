"""GPUs watched while a job runs: a lost one, XID errors, and which rank has which."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from stand_in_driver import build_driver

from runner.observe.gpu_monitor import GpuMonitor, gpus_of_ranks
from runner.observe.nvml import Gpu, read_inventory

GPUS = (Gpu(0, uuid="GPU-aa"), Gpu(1, uuid="GPU-bb"), Gpu(2, uuid="GPU-cc"))

# GPU 0 works and reported XID 79 once; GPU 1 opens, and is lost.
DRIVER_SOURCE = r"""
#include <string.h>
#define TIMEOUT 10
#define GPU_IS_LOST 15
typedef void *Gpu;
typedef struct { unsigned long long total, free, used; } Memory;
typedef struct { unsigned gpu, memory; } Utilization;
typedef struct { char legacy[16]; unsigned numbers[5]; char id[32]; } Pci;
typedef struct { Gpu gpu; unsigned long long type, data; unsigned gi, ci; } Event;
int nvmlInitWithFlags(unsigned flags) { return 0; }
int nvmlShutdown(void) { return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, Gpu *gpu) { *gpu = (Gpu)(long)(i + 1); return 0; }
int nvmlDeviceGetIndex(Gpu gpu, unsigned *index) { *index = (long)gpu - 1; return 0; }
int nvmlDeviceGetUUID(Gpu gpu, char *text, unsigned size) { strcpy(text, "GPU-aa"); return 0; }
int nvmlDeviceGetName(Gpu gpu, char *text, unsigned size) { strcpy(text, "Test GPU"); return 0; }
int nvmlDeviceGetPciInfo_v3(Gpu gpu, Pci *pci) { strcpy(pci->id, "0000:01:00.0"); return 0; }
int nvmlDeviceGetMemoryInfo(Gpu gpu, Memory *memory) {
    if ((long)gpu == 2) return GPU_IS_LOST;
    memory->total = 100ull << 20; memory->free = 60ull << 20; memory->used = 40ull << 20;
    return 0;
}
int nvmlDeviceGetUtilizationRates(Gpu gpu, Utilization *busy) {
    busy->gpu = 87; busy->memory = 21;
    return 0;
}
int nvmlEventSetCreate(void **set) { *set = (void *)1; return 0; }
int nvmlDeviceRegisterEvents(Gpu gpu, unsigned long long types, void *set) { return 0; }
int nvmlEventSetWait_v2(void *set, Event *event, unsigned timeout) {
    static int told = 0;
    if (told++) return TIMEOUT;
    event->gpu = (Gpu)1; event->type = 8; event->data = 79;
    return 0;
}
"""

SHOW = """
from runner.observe.gpu_monitor import GpuMonitor
from runner.serve.gpu_metrics import GpuMetrics
from runner.serve.metrics import Metrics
metrics = Metrics()
metrics.add(GpuMetrics(GpuMonitor(), (1, 0)))
print(metrics.text().decode())
"""


def test_ranks_have_the_gpus_that_torch_counts() -> None:
    def held(devices: tuple[int, ...], visible: str | None) -> dict[int, int]:
        found = gpus_of_ranks(GPUS, devices, visible)
        return {rank: gpu.index for rank, gpu in found.items()}

    assert held((2, 0), None) == {0: 2, 1: 0}
    assert held((0, 1), "2,0") == {0: 2, 1: 0}
    assert held((0, 1), "GPU-cc, GPU-a") == {0: 2, 1: 0}
    assert held((0, 1), "1") == {0: 1}
    assert held((0,), "") == {}


@pytest.mark.skipif(read_inventory().driver != "absent", reason="this host has an NVIDIA driver")
def test_a_host_without_a_driver_is_watched_in_vain() -> None:
    monitor = GpuMonitor()
    assert monitor.read().reason == "no NVIDIA driver: libnvidia-ml.so.1 not found"
    assert monitor.last_xids == {}


def gauges(tmp_path: Path, driver: str) -> dict[tuple[str, str], tuple[float, str]]:
    """Value and labels of each gauge of a GPU, by its name and rank, with a driver in C."""
    directory = build_driver(tmp_path, driver)
    environment = {**os.environ, "LD_LIBRARY_PATH": str(directory)}
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    done = subprocess.run(
        [sys.executable, "-c", SHOW],
        env=environment,
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=True,
    )
    told = {}
    for line in done.stdout.splitlines():
        name, _, rest = line.partition("{")
        if name.startswith(("DCGM", "shardline_gpu")):
            labels, _, value = rest.rpartition("} ")
            told[name, labels.rpartition('rank="')[2].rstrip('"')] = float(value), labels
    return told


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_gauges_have_the_names_and_labels_of_dcgm(tmp_path: Path) -> None:
    told = gauges(tmp_path, DRIVER_SOURCE)
    labels = told["DCGM_FI_DEV_GPU_UTIL", "1"][1]
    for label in (
        'UUID="GPU-aa"',
        'pci_bus_id="0000:01:00.0"',
        'device="nvidia0"',
        'modelName="Test GPU"',
    ):
        assert label in labels
    assert {key: value for key, (value, _) in told.items()} == {
        ("DCGM_FI_DEV_GPU_UTIL", "1"): 87,
        ("DCGM_FI_DEV_MEM_COPY_UTIL", "1"): 21,
        ("DCGM_FI_DEV_FB_USED", "1"): 40,
        ("DCGM_FI_DEV_FB_FREE", "1"): 60,
        ("DCGM_FI_DEV_XID_ERRORS", "0"): 0,
        ("DCGM_FI_DEV_XID_ERRORS", "1"): 79,
        ("shardline_gpu_lost", "0"): 1,
        ("shardline_gpu_lost", "1"): 0,
    }


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_all_gpus_are_lost_where_the_driver_answers_nothing(tmp_path: Path) -> None:
    """As in a container that has lost the permission for its devices."""
    told = gauges(tmp_path, "int nvmlInitWithFlags(unsigned flags) { return 999; }")
    lost = {key: value for key, (value, _) in told.items() if key[0] == "shardline_gpu_lost"}
    assert lost == {("shardline_gpu_lost", "0"): 1, ("shardline_gpu_lost", "1"): 1}
