"""The memory and CPU limits that control groups (version 1 and 2) put on this process.

Not here: what the machine itself has (`host`), nor whether a limit is too low (`host_checks`).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

# Version 1 says "no limit" with the highest multiple of the page size, not with a word.
_NO_LIMIT_BYTES = 1 << 60


@dataclass(frozen=True)
class CgroupLimits:
    """The tightest limit of any group above this process; None = no limit.

    `memory_used_bytes` is that of the group with the tightest memory limit, less the file cache
    that the kernel gives back on demand.
    """

    memory_limit_bytes: int | None = None
    memory_used_bytes: int | None = None
    num_cpus: float | None = None

    @property
    def memory_free_bytes(self) -> int | None:
        """What this process may still take, or None where nothing limits it."""
        if self.memory_limit_bytes is None:
            return None
        return max(0, self.memory_limit_bytes - (self.memory_used_bytes or 0))


def read_cgroup_limits(root: Path = Path("/")) -> CgroupLimits:
    """Read the limits of the groups that /proc/self names, each up to the top of its mount.

    Args:
        root: where /proc and /sys are; another directory than "/" in tests.
    """
    memory: list[tuple[int, int]] = []
    cpus: list[float] = []
    for group in _groups(root):
        memory += filter(None, (_memory_v1(group), _memory_v2(group)))
        cpus += filter(None, (_cpus_v1(group), _cpus_v2(group)))
    limit, used = min(memory, default=(None, None))
    return CgroupLimits(limit, used, min(cpus, default=None))


def parse_memberships(text: str) -> dict[str, str]:
    """/proc/self/cgroup as {controller: path}; the controller of version 2 is ""."""
    memberships = {}
    for line in text.splitlines():
        _, controllers, path = line.split(":", 2)
        memberships.update(dict.fromkeys(controllers.split(","), path))
    return memberships


def parse_mounts(text: str) -> dict[str, tuple[str, str]]:
    """/proc/self/mountinfo as {controller: (mount point, the group mounted there)}."""
    mounts = {}
    for line in text.splitlines():
        mount, _, source = line.partition(" - ")
        top, point = mount.split()[3:5]
        file_system, _, options = source.split(maxsplit=2)
        if file_system == "cgroup2":
            mounts[""] = (point, top)
        elif file_system == "cgroup":
            mounts.update(dict.fromkeys(options.split(","), (point, top)))
    return mounts


def _groups(root: Path) -> Iterable[Path]:
    memberships = parse_memberships(_read(root / "proc/self/cgroup") or "")
    mounts = parse_mounts(_read(root / "proc/self/mountinfo") or "")
    for controller in ("memory", "cpu", ""):
        if controller in memberships and controller in mounts:
            point, top = mounts[controller]
            yield from _ancestry(root / point.lstrip("/"), memberships[controller], top)


def _ancestry(point: Path, path: str, top: str) -> Iterable[Path]:
    """The group's directory and those above it, as far as the mount shows them."""
    # In a container the path can be the host's and the mount the container's own group.
    inside = path.removeprefix(top) if top != "/" else path
    group = point / inside.strip("/")
    while group != point:
        yield group
        group = group.parent
    yield point


def _memory_v1(group: Path) -> tuple[int, int] | None:
    limit = _read_as(int, group / "memory.limit_in_bytes")
    used = _read_as(int, group / "memory.usage_in_bytes") or 0
    if limit is None or limit >= _NO_LIMIT_BYTES:
        return None
    return limit, max(0, used - _reclaimable(group, "total_inactive_file"))


def _memory_v2(group: Path) -> tuple[int, int] | None:
    limit = _read_as(int, group / "memory.max")
    used = _read_as(int, group / "memory.current") or 0
    return None if limit is None else (limit, max(0, used - _reclaimable(group, "inactive_file")))


def _reclaimable(group: Path, key: str) -> int:
    for line in (_read(group / "memory.stat") or "").splitlines():
        name, _, value = line.partition(" ")
        if name == key:
            return int(value)
    return 0


def _cpus_v1(group: Path) -> float | None:
    quota = _read_as(int, group / "cpu.cfs_quota_us")
    period = _read_as(int, group / "cpu.cfs_period_us")
    return quota / period if quota and period and quota > 0 else None


def _cpus_v2(group: Path) -> float | None:
    quota, _, period = (_read(group / "cpu.max") or "max").partition(" ")
    return None if quota == "max" else int(quota) / int(period)


def _read_as(kind: Callable[[str], int], path: Path) -> int | None:
    text = _read(path)
    return None if text in (None, "", "max") else kind(str(text))


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return None
