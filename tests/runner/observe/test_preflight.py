"""What one job needs, judged on readings that lack something."""

from dataclasses import replace

from runner.observe.finding import Finding
from runner.observe.host import Directory, Host, Space, read_host
from runner.observe.host_checks import GIB, MIB
from runner.observe.nvml import Inventory
from runner.observe.preflight import Demand, judge
from runner.observe.software import Software

ABSENT = Inventory("absent", reason="no driver")
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
    found = errors(Demand(2, gpus_for="compile.backend: tensorrt"), host())
    gpus = next(finding for finding in found if finding.check == "gpus")
    assert gpus.detail.startswith("0 found; 2 demanded by compile.backend: tensorrt")
    assert (gpus.fix or "").startswith("docker run --gpus all")
