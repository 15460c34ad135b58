"""What this host or container gives a process: limits, memory, CPUs, directories, loopback.

Not here: GPUs (`nvml`), installed packages (`software`), nor whether it is enough (`host_checks`).
"""

import os
import pwd
import resource
import socket
import tempfile
from dataclasses import dataclass
from pathlib import Path

from runner.observe.cgroup import CgroupLimits, read_cgroup_limits

_LOOPBACK = "127.0.0.1"
_LOOPBACK_TIMEOUT_S = 2.0

# Files by which a container runtime shows itself; no environment variable can fake or hide them.
_CONTAINER_MARKS = {
    "var/run/secrets/kubernetes.io": "Kubernetes",
    "run/.containerenv": "Podman",
    ".dockerenv": "Docker",
}
_CONTAINER_GROUPS = ("kubepods", "docker", "containerd", "libpod", "lxc")


@dataclass(frozen=True)
class Space:
    """A file system's size and what an ordinary user may still write, in bytes."""

    total_bytes: int
    free_bytes: int


@dataclass(frozen=True)
class Directory:
    """A directory that is written to; `space` is None where it does not exist."""

    path: str
    writable: bool
    space: Space | None


@dataclass(frozen=True)
class Limits:
    """Of a process that is started here; None = unlimited.

    Attributes:
        nofile: open files, as many as `serve` may ask for; the others as they are inherited.
    """

    memlock_bytes: int | None
    stack_bytes: int | None
    nofile: int | None


@dataclass(frozen=True)
class Host:
    """One reading of the host. `container` names the runtime, or is None outside a container."""

    container: str | None
    shm: Space | None
    limits: Limits
    temp_dir: Directory
    home_dir: Directory
    uid: int
    gid: int
    has_passwd_line: bool
    memory_total_bytes: int
    memory_available_bytes: int
    num_cpus: int
    cgroup: CgroupLimits
    loopback_error: str | None


def read_host() -> Host:
    """Read everything once. Talks to itself over loopback for a moment; leaves nothing behind."""
    memory = parse_meminfo(Path("/proc/meminfo").read_text(encoding="utf-8"))
    return Host(
        container=find_container(),
        shm=read_space("/dev/shm"),
        limits=read_limits(),
        temp_dir=read_directory(_temp_path()),
        home_dir=read_directory(os.path.expanduser("~")),
        uid=os.getuid(),
        gid=os.getgid(),
        has_passwd_line=has_passwd_line(os.getuid()),
        memory_total_bytes=memory["MemTotal"],
        memory_available_bytes=memory["MemAvailable"],
        num_cpus=len(os.sched_getaffinity(0)),
        cgroup=read_cgroup_limits(),
        loopback_error=find_loopback_error(),
    )


def find_container(root: Path = Path("/")) -> str | None:
    """The container runtime's name, "a container" where only its control group shows, or None."""
    for mark, runtime in _CONTAINER_MARKS.items():
        if (root / mark).exists():
            return runtime
    try:
        groups = (root / "proc/1/cgroup").read_text(encoding="utf-8")
    except OSError:
        return None
    return "a container" if any(word in groups for word in _CONTAINER_GROUPS) else None


def read_space(path: str) -> Space | None:
    """Size and free bytes of the file system at `path`, or None where there is no such path."""
    try:
        figures = os.statvfs(path)
    except OSError:
        return None
    return Space(figures.f_blocks * figures.f_frsize, figures.f_bavail * figures.f_frsize)


def read_directory(path: str) -> Directory:
    """Whether this user can write into `path`, and how much."""
    return Directory(path, os.access(path, os.W_OK | os.X_OK), read_space(path))


def read_limits() -> Limits:
    """Those of this process."""
    return Limits(
        memlock_bytes=_limit(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]),
        stack_bytes=_limit(resource.getrlimit(resource.RLIMIT_STACK)[0]),
        nofile=_limit(resource.getrlimit(resource.RLIMIT_NOFILE)[1]),
    )


def has_passwd_line(uid: int) -> bool:
    """Whether the user database has a line for `uid`."""
    try:
        pwd.getpwuid(uid)
    except KeyError:
        return False
    return True


def parse_meminfo(text: str) -> dict[str, int]:
    """/proc/meminfo as {name: bytes}."""
    sizes = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        number, _, unit = value.strip().partition(" ")
        sizes[name] = int(number) * (1024 if unit == "kB" else 1)
    return sizes


def find_loopback_error(address: str = _LOOPBACK) -> str | None:
    """Why no two processes of this host can talk over `address`, or None where they can.

    Binding alone does not show it: an interface that is down can still hold its address.
    """
    try:
        with (
            socket.create_server((address, 0)) as server,
            socket.create_connection(server.getsockname(), timeout=_LOOPBACK_TIMEOUT_S),
        ):
            return None
    except OSError as error:
        return str(error)


def _temp_path() -> str:
    try:
        return tempfile.gettempdir()
    except FileNotFoundError:  # no directory that Python tries is writable
        return "/tmp"


def _limit(value: int) -> int | None:
    return None if value == resource.RLIM_INFINITY else value
