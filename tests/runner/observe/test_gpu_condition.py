"""Health, clocks, MIG, persistence and links of GPUs in good and bad states."""

from runner.observe.gpu_condition import (
    judge_clocks,
    judge_condition,
    judge_gpu_memory,
    judge_health,
    judge_mig,
    judge_nvlink,
    judge_p2p,
    judge_persistence,
)
from runner.observe.links import GpuPair
from runner.observe.nvml import Gpu

GIB = 1 << 30


def test_health() -> None:
    assert judge_health([Gpu(0, ecc_uncorrected_errors=0)]).detail == "no memory errors"
    assert judge_health([Gpu(0)]).status == "ok"
    lost = judge_health([Gpu(0), Gpu(1, fault="GPU is lost")])
    assert (lost.status, lost.detail) == ("error", "GPU 1: GPU is lost")
    assert judge_health([Gpu(0, row_remap_failed=True)]).status == "error"
    sick = judge_health([Gpu(0, ecc_uncorrected_errors=3), Gpu(1, row_remap_pending=True)])
    assert sick.status == "warning"
    assert "GPU 0: 3 uncorrected memory errors" in sick.detail
    assert "GPU 1: a memory row waits" in sick.detail


def test_memory_held_by_another_process() -> None:
    free = Gpu(0, memory_free_bytes=139 * GIB, memory_total_bytes=140 * GIB)
    taken = Gpu(1, memory_free_bytes=20 * GIB, memory_total_bytes=140 * GIB)
    assert judge_gpu_memory([free]).detail == "at least 139 GiB free on each GPU"
    finding = judge_gpu_memory([free, taken])
    assert (finding.status, finding.detail) == ("warning", "GPU 1: 20 GiB free of 140 GiB")
    assert judge_gpu_memory([Gpu(0)]).detail == "not told"


def test_clocks_that_are_held_down() -> None:
    hot = Gpu(1, throttle_reasons=("software power cap", "hardware thermal slowdown"))
    finding = judge_clocks([Gpu(0, throttle_reasons=("idle",)), hot])
    assert (finding.status, finding.detail) == ("warning", "GPU 1: hardware thermal slowdown")
    held = judge_clocks([Gpu(0, throttle_reasons=("clock setting",))])
    assert held.status == "warning"
    assert "--reset-gpu-clocks" in (held.fix or "")


def test_clocks_that_are_free() -> None:
    gpus = [
        Gpu(0, sm_clock_mhz=345, sm_clock_max_mhz=1980, temperature_c=31, power_w=75.4),
        Gpu(1, sm_clock_mhz=1980, sm_clock_max_mhz=1980, throttle_reasons=("idle",)),
    ]
    finding = judge_clocks(gpus)
    assert finding.status == "ok"
    assert finding.detail == "SM clock 345-1980 MHz, up to 1980 MHz, 31 C, 75 W"
    assert judge_clocks([Gpu(0)]).detail == "not told"


def test_mig() -> None:
    finding = judge_mig([Gpu(0), Gpu(1, mig_enabled=True), Gpu(3, mig_enabled=True)])
    assert (finding.status, finding.fix) == ("warning", "nvidia-smi -i 1,3 -mig 0")
    assert judge_mig([Gpu(0), Gpu(1, mig_enabled=False)]).status == "ok"


def test_persistence_unknown_is_no_warning() -> None:
    assert judge_persistence([Gpu(0)]).status == "ok"
    assert judge_persistence([Gpu(0, persistence_enabled=False)]).status == "warning"


def test_p2p() -> None:
    good = GpuPair(0, 1, read="ok", write="ok", nvlink="ok")
    bad = GpuPair(0, 2, read="ok", write="chipset not supported")
    assert judge_p2p([]).status == "absent"
    assert judge_p2p([good]).detail == "all pairs: NVLink"
    finding = judge_p2p([good, bad])
    assert finding.status == "warning"
    assert "GPU 0 and 2: chipset not supported" in finding.detail


def test_nvlink() -> None:
    assert judge_nvlink([Gpu(0, nvlinks_active=18), Gpu(1, nvlinks_active=18)]).status == "ok"
    finding = judge_nvlink([Gpu(0, nvlinks_active=18), Gpu(1, nvlinks_active=16)])
    assert (finding.status, finding.detail) == ("warning", "18 links, but fewer on GPU 1")
    assert judge_nvlink([Gpu(0, nvlinks_active=0)]).status == "absent"
    assert judge_nvlink([Gpu(0)]).status == "absent"


def test_the_same_checks_with_and_without_a_gpu() -> None:
    without = judge_condition((), pairs=())
    with_one = judge_condition((Gpu(0),), pairs=())
    assert [finding.check for finding in without] == [finding.check for finding in with_one]
    assert {finding.status for finding in without} == {"absent"}
