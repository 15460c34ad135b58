"""What one job needs, judged on readings that lack something."""

from dataclasses import replace

import pytest

from runner.observe.finding import Finding
from runner.observe.host import Directory, Host, Space, read_host
from runner.observe.host_checks import GIB, MIB
from runner.observe.nvml import Gpu, Inventory
from runner.observe.preflight import Demand, judge
from runner.observe.software import Software

ABSENT = Inventory("absent", reason="no driver")
OLD = Inventory("present", driver_version="470", cuda_version=(11, 4), gpus=(Gpu(0), Gpu(1)))
CPU_TORCH = Software("2.13.0+cpu")
CUDA_TORCH = Software("2.13.0", torch_cuda="13.0", num_torch_gpus=0)
CACHE = Directory("/cache", True, Space(9 * GIB, 9 * GIB))


def host(**changes: object) -> Host:
    good = {
        "container": "Docker",
        "shm": Space(2 * GIB, 2 * GIB),
        "temp_dir": Directory("/tmp", True, Space(9 * GIB, 9 * GIB)),
        "uid": 12345,
    }
    return replace(read_host(), **(good | changes))  # type: ignore[arg-type]


def errors(demand: Demand, reading: Host, cache: Directory | None = CACHE) -> list[Finding]:
    found = judge(demand, ABSENT, software=Software("2.13.0"), host=reading, cache=cache)
    return [finding for finding in found if finding.status == "error"]


def test_a_host_that_has_all() -> None:
    assert errors(Demand(4), host()) == []


def test_ranks_on_a_cpu_need_shared_memory_too() -> None:
    little = host(shm=Space(64 * MIB, 64 * MIB))
    (found,) = errors(Demand(2), little)
    assert found.fix == "docker run --shm-size=1g   (compose: shm_size: 1gb)"
    assert errors(Demand(1), little) == []


def test_a_cache_that_cannot_be_written_names_the_mount_and_the_user() -> None:
    (found,) = errors(Demand(1), host(), replace(CACHE, writable=False))
    assert (found.check, found.detail) == ("cache", "/cache is not writable")
    assert "docker run -v shardline-cache:/cache" in (found.fix or "")
    assert "chown 12345" in (found.fix or "")
    assert errors(Demand(1), host(), None) == []


def test_a_missing_gpu_says_what_asks_for_it() -> None:
    found = errors(Demand(2, "needed", "compile.backend: tensorrt", "--device cpu"), host())
    gpus = next(finding for finding in found if finding.check == "gpus")
    assert gpus.detail == (
        "0 found; 2 demanded by compile.backend: tensorrt; for the CPU: --device cpu"
    )
    assert (gpus.fix or "").startswith("docker run --gpus all")


def checked(
    demand: Demand, inventory: Inventory, software: Software, container: str | None
) -> dict[str, str]:
    """What was found of GPUs: the status of each check."""
    reading = host(container=container)
    found = judge(demand, inventory, software=software, host=reading, cache=CACHE)
    return {f.check: f.status for f in found if f.check in ("driver", "cuda", "gpus")}


@pytest.mark.parametrize(
    ("inventory", "software", "container", "is_asked_for"),
    [
        (ABSENT, CUDA_TORCH, "Docker", True),
        (ABSENT, CUDA_TORCH, None, False),
        (ABSENT, CPU_TORCH, "Docker", False),
        (OLD, CUDA_TORCH, None, True),
        (OLD, CPU_TORCH, "Docker", False),
    ],
    ids=["container", "host", "cpu-image", "driver", "driver-cpu-image"],
)
def test_a_job_that_takes_what_is_there_expects_gpus(
    inventory: Inventory, software: Software, container: str | None, is_asked_for: bool
) -> None:
    demand = Demand(2, "expected", "parallel.device: auto", "--device cpu")
    assert (checked(demand, inventory, software, container).get("gpus") == "error") is is_asked_for


def test_a_job_on_the_cpu_does_not_look_at_gpus() -> None:
    assert checked(Demand(2), OLD, CUDA_TORCH, "Docker") == {}


def test_an_old_driver_is_told_without_a_word_about_gpus_that_lack() -> None:
    torch = replace(CUDA_TORCH, cuda_error="the driver is too old")
    demand = Demand(2, "expected", "parallel.device: auto", "--device cpu")
    found = judge(demand, OLD, software=torch, host=host(), cache=CACHE)
    said = {f.check: f.detail for f in found if f.status == "error"}
    assert said["cuda"] == "driver supports 11.4, torch is built with 13.0"
    assert said["gpus"] == "2 found; torch: the driver is too old"


def test_locked_memory_is_looked_at_for_gpus_that_are_taken() -> None:
    limited = host(limits=replace(host().limits, memlock_bytes=8 * MIB))
    inventory = replace(OLD, cuda_version=(13, 0))
    torch = replace(CUDA_TORCH, num_torch_gpus=2)
    for demand, expected in ((Demand(2, "taken", "x"), "warning"), (Demand(2), "ok")):
        found = judge(demand, inventory, software=torch, host=limited, cache=CACHE)
        assert next(f for f in found if f.check == "memlock").status == expected


def test_what_runs_anywhere_asks_for_gpus_only_where_a_driver_is() -> None:
    demand = Demand(3, "taken", "a bundle")
    assert checked(demand, ABSENT, CUDA_TORCH, "Docker") == {}
    assert checked(demand, OLD, CUDA_TORCH, "Docker")["gpus"] == "error"
