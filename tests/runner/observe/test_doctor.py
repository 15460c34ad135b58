"""The whole diagnosis: of this host, and of readings that describe another one."""

import json

import pytest

from parallel.errors import PreflightError
from runner.observe.cgroup import CgroupLimits
from runner.observe.doctor import diagnose, judge
from runner.observe.host import Directory, Host, Limits, Space
from runner.observe.links import GpuPair
from runner.observe.nvml import Gpu, Inventory, read_inventory
from runner.observe.software import Software

GIB = 1 << 30

HAS_GPU = bool(read_inventory().gpus)
TWO_GPUS = Inventory(
    "present",
    driver_version="580.10",
    cuda_version=(13, 0),
    gpus=(Gpu(0, name="A"), Gpu(1, name="B")),
    pairs=(GpuPair(0, 1, read="ok", write="ok", nvlink="ok"),),
)
GOOD_SOFTWARE = Software(
    torch_version="2.13.0",
    torch_cuda="13.0",
    num_torch_gpus=2,
    nccl_version="2.27.5",
    distributions={"torch-tensorrt-rtx": "2.13.0", "tensorrt-rtx": "1.5.0"},
)


def make_host(*, shm_bytes: int = 16 * GIB, has_passwd_line: bool = True) -> Host:
    disk = Space(100 * GIB, 50 * GIB)
    return Host(
        container="Docker",
        shm=Space(shm_bytes, shm_bytes),
        limits=Limits(memlock_bytes=None, stack_bytes=None, nofile=None),
        temp_dir=Directory("/tmp", writable=True, space=disk),
        home_dir=Directory("/home/u", writable=True, space=disk),
        uid=1000,
        gid=1000,
        has_passwd_line=has_passwd_line,
        memory_total_bytes=64 * GIB,
        memory_available_bytes=60 * GIB,
        num_cpus=32,
        cgroup=CgroupLimits(),
        loopback_error=None,
    )


def test_a_good_host_passes_every_check() -> None:
    diagnosis = judge(TWO_GPUS, software=GOOD_SOFTWARE, host=make_host(), demanded=2)
    trouble = [f for f in diagnosis.findings if f.status in ("warning", "error")]
    assert trouble == []
    assert diagnosis.exit_code == 0
    names = [finding.check for finding in diagnosis.findings]
    assert len(names) == len(set(names)) == 25


def test_one_error_is_enough_to_fail() -> None:
    small = make_host(shm_bytes=64 << 20)
    diagnosis = judge(TWO_GPUS, software=GOOD_SOFTWARE, host=small, demanded=0)
    assert [f.check for f in diagnosis.findings if f.status == "error"] == ["shm"]
    assert diagnosis.exit_code == PreflightError.exit_code == 3


def test_a_passwd_line_is_an_error_only_with_torch_tensorrt() -> None:
    host = make_host(has_passwd_line=False)
    with_it = judge(TWO_GPUS, software=GOOD_SOFTWARE, host=host, demanded=0)
    bare = Software(torch_version="2.13.0", torch_cuda="13.0", num_torch_gpus=2, nccl_version="2")
    without = judge(TWO_GPUS, software=bare, host=host, demanded=0)
    assert (with_it.exit_code, without.exit_code) == (3, 0)


def test_gpus_that_are_demanded_count_for_the_host_too() -> None:
    # 64 GiB are enough for one run, not for twenty ranks of 4 GiB.
    nothing = Inventory("absent", "no NVIDIA driver: libnvidia-ml.so.1 not found")
    diagnosis = judge(nothing, software=GOOD_SOFTWARE, host=make_host(), demanded=20)
    status = {finding.check: finding.status for finding in diagnosis.findings}
    assert (status["gpus"], status["memory"], status["cpus"]) == ("error", "warning", "warning")


def test_json_holds_findings_gpus_and_versions() -> None:
    diagnosis = judge(TWO_GPUS, software=GOOD_SOFTWARE, host=make_host(), demanded=0)
    data = json.loads(json.dumps(diagnosis.to_json()))
    assert set(data["findings"][0]) == {"check", "status", "detail", "fix"}
    assert [gpu["name"] for gpu in data["gpus"]] == ["A", "B"]
    assert data["gpu_pairs"][0]["path"] == "NVLink"
    assert data["versions"]["driver_cuda"] == "13.0"
    assert data["versions"]["tensorrt-rtx"] == "1.5.0"


@pytest.mark.skipif(HAS_GPU, reason="this host has a GPU")
def test_this_host_runs_on_its_cpu_but_has_no_gpu_to_demand() -> None:
    status = {f.check: f.status for f in diagnose().findings}
    assert status["driver"] == status["gpus"] == status["clocks"] == "absent"
    demanding = diagnose(num_gpus_demanded=1)
    assert demanding.exit_code == 3


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="NVML shows no GPU")
def test_a_host_with_a_gpu_has_a_driver_and_something_to_say_of_it() -> None:
    status = {f.check: f.status for f in diagnose(num_gpus_demanded=1).findings}
    assert status["driver"] == "ok"
    assert "absent" not in {status[check] for check in ("gpus", "gpu_health", "clocks", "mig")}
