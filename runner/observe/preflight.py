"""What one job needs of this host or container, by the checks of `doctor`.

`doctor` judges a host for whatever may come; this judges it for one job, and adds what only a
job can tell: how many ranks there are, whether they need GPUs, and where caches are written.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from runner.observe.finding import Finding
from runner.observe.gpu_checks import judge_gpus
from runner.observe.host import Directory, Host, find_container, read_directory, read_host
from runner.observe.host_checks import judge_cache_dir, judge_host, judge_shm, judge_socket_dir
from runner.observe.nvml import Inventory, read_inventory
from runner.observe.software import Software, find_flavour, read_software

_CACHE = "SHARDLINE_CACHE"


@dataclass(frozen=True)
class Demand:
    """What a job asks of the host.

    Attributes:
        gpus: whether every rank needs one; "taken" where there is a driver, by a torch that is
            built for CUDA, and "expected" by it in a container without a driver, too, since that
            may only lack an option.
        gpus_for: what asks for them, for the message.
        without_gpus: what lets the job run without, for the message.
    """

    num_ranks: int
    gpus: Literal["none", "needed", "taken", "expected"] = "none"
    gpus_for: str = ""
    without_gpus: str | None = None


def inspect_host(demand: Demand) -> list[Finding]:
    """Read this host and judge it; imports torch where the job may need GPUs."""
    inventory, host, cache = read_inventory(), read_host(), _read_cache()
    if cache is not None:
        # Python would take the cache for its temporary files; the image writes more than those.
        host = replace(host, temp_dir=read_directory("/tmp"))
    may_need = demand.gpus in ("needed", "expected") or inventory.driver != "absent"
    software = read_software() if may_need else Software()
    return list(judge(demand, inventory, software=software, host=host, cache=cache))


def inspect_socket_dir(uds: str) -> Finding:
    """Judge the folder in which a server is to make this Unix socket."""
    folder = read_directory(os.path.dirname(os.path.abspath(uds)))
    inside = find_container() is not None
    return judge_socket_dir(folder, gid=os.getgid(), in_container=inside)


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
    needs_gpus = _needs_gpus(demand, inventory, torch_cuda=software.torch_cuda, inside=inside)
    num_gpus = demand.num_ranks if needs_gpus else 0
    if num_gpus:
        found = judge_gpus(inventory, software=software, demanded=num_gpus, in_container=inside)
        for finding in found:
            if finding.check == "gpus" and finding.detail.endswith("demanded"):
                detail = f"{finding.detail} by {demand.gpus_for}"
                if not inventory.gpus and demand.without_gpus:
                    detail += f"; for the CPU: {demand.without_gpus}"
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


def _needs_gpus(
    demand: Demand, inventory: Inventory, *, torch_cuda: str | None, inside: bool
) -> bool:
    match demand.gpus:
        case "taken":
            return torch_cuda is not None and inventory.driver != "absent"
        case "expected":
            return torch_cuda is not None and (inventory.driver != "absent" or inside)
    return demand.gpus == "needed"


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
