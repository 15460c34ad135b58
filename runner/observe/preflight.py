"""What one job needs of this host or container, by the checks of `doctor`.

`doctor` judges a host for whatever may come; this judges it for one job, and adds what only a
job can tell: how many ranks there are, whether they need GPUs, and where caches are written.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from runner.observe.finding import Finding
from runner.observe.gpu_checks import judge_gpus
from runner.observe.host import Directory, Host, read_directory, read_host
from runner.observe.host_checks import judge_cache_dir, judge_host, judge_shm
from runner.observe.nvml import Inventory, read_inventory
from runner.observe.software import Software, find_flavour, read_software

_CACHE = "SHARDLINE_CACHE"


@dataclass(frozen=True)
class Demand:
    """What a job asks of the host.

    Attributes:
        gpus_for: what needs a GPU for every rank, for the message; None: the job runs without.
    """

    num_ranks: int
    gpus_for: str | None = None


def inspect_host(demand: Demand) -> list[Finding]:
    """Read this host and judge it; imports torch where the job needs GPUs."""
    inventory = read_inventory()
    needs_torch = bool(demand.gpus_for or inventory.gpus)
    software = read_software() if needs_torch else Software()
    host, cache = read_host(), _read_cache()
    if cache is not None:
        # Python would take the cache for its temporary files; the image writes more than those.
        host = replace(host, temp_dir=read_directory("/tmp"))
    return list(judge(demand, inventory, software=software, host=host, cache=cache))


def judge(
    demand: Demand,
    inventory: Inventory,
    *,
    software: Software,
    host: Host,
    cache: Directory | None,
) -> Iterator[Finding]:
    """Every check for a job over one set of readings. Pure.

    Args:
        cache: None: there is no folder that all caches lie in, as outside of an image.
    """
    inside = host.container is not None
    num_gpus = demand.num_ranks if demand.gpus_for else 0
    if num_gpus:
        found = judge_gpus(inventory, software=software, demanded=num_gpus, in_container=inside)
        for finding in found:
            if finding.check == "gpus" and finding.status == "error":
                detail = f"{finding.detail} by {demand.gpus_for}"
                if not inventory.gpus:
                    detail += "; for the CPU: --device cpu, and another compile.backend"
                yield replace(finding, detail=detail)
            else:
                yield finding
    needs_passwd = find_flavour(software.distributions) != "none"
    for finding in judge_host(host, num_gpus=num_gpus, needs_passwd=needs_passwd):
        # What is slow is doctor's business; the shared memory is that of all ranks, of a CPU, too.
        if finding.check not in ("shm", "home_dir", "cpus"):
            yield finding
    yield judge_shm(host.shm, num_gpus=demand.num_ranks, in_container=inside)
    if cache is not None:
        yield judge_cache_dir(cache, uid=host.uid)


def _read_cache() -> Directory | None:
    """The folder that an image keeps all caches in; that it can be written is tried."""
    path = os.environ.get(_CACHE)
    if path is None:
        return None
    found = read_directory(path)
    probe = Path(path) / f".probe-{os.getpid()}"
    try:
        probe.write_bytes(b"")
        probe.unlink()
    except OSError:
        return replace(found, writable=False)
    return found
