"""Readings of this host, and of directories made to look like others."""

import os
import pwd
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from runner.observe.host import (
    find_container,
    find_loopback_error,
    has_passwd_line,
    parse_meminfo,
    read_directory,
    read_host,
    read_space,
)

ROOT = Path(__file__).parents[3]


def test_this_host_is_read_whole() -> None:
    host = read_host()
    assert 0 < host.memory_available_bytes <= host.memory_total_bytes
    assert 1 <= host.num_cpus <= (os.cpu_count() or 1)
    assert host.limits.nofile == resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    assert host.temp_dir.writable
    assert host.uid == os.getuid()
    assert host.loopback_error is None


@pytest.mark.parametrize(
    ("mark", "container"),
    [
        (".dockerenv", "Docker"),
        ("run/.containerenv", "Podman"),
        ("var/run/secrets/kubernetes.io", "Kubernetes"),
        ("etc/hostname", None),
    ],
)
def test_container_marks(tmp_path: Path, mark: str, container: str | None) -> None:
    path = tmp_path / mark
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    assert find_container(tmp_path) == container


def test_a_container_can_show_by_its_group_alone(tmp_path: Path) -> None:
    groups = tmp_path / "proc/1/cgroup"
    groups.parent.mkdir(parents=True)
    groups.write_text("1:memory:/kubepods/besteffort/pod1\n")
    assert find_container(tmp_path) == "a container"
    groups.write_text("0::/init.scope\n")
    assert find_container(tmp_path) is None


def test_meminfo_is_in_bytes() -> None:
    text = "MemTotal:       24684092 kB\nHugePages_Total:       3\n"
    assert parse_meminfo(text) == {"MemTotal": 24684092 * 1024, "HugePages_Total": 3}


def test_space_of_a_path_that_is_missing(tmp_path: Path) -> None:
    space = read_space(str(tmp_path))
    assert space is not None
    assert 0 < space.free_bytes <= space.total_bytes
    assert read_space(str(tmp_path / "missing")) is None
    assert not read_directory(str(tmp_path / "missing")).writable


def test_a_uid_without_a_passwd_line() -> None:
    taken = {entry.pw_uid for entry in pwd.getpwall()}
    free = next(uid for uid in range(54321, 60000) if uid not in taken)
    assert has_passwd_line(os.getuid()) == (os.getuid() in taken)
    assert not has_passwd_line(free)


def test_an_address_that_is_not_of_this_host() -> None:
    # 192.0.2.0/24 is reserved for documentation: no host has it.
    assert "assign" in (find_loopback_error("192.0.2.1") or "")


def test_limits_are_those_that_children_inherit_and_may_raise() -> None:
    lowered = (
        "import resource as r, runner.observe.host as h;"
        "r.setrlimit(r.RLIMIT_NOFILE, (200, 3000));"
        "r.setrlimit(r.RLIMIT_MEMLOCK, (65536, r.getrlimit(r.RLIMIT_MEMLOCK)[1]));"
        "limits = h.read_limits(); print(limits.nofile, limits.memlock_bytes)"
    )
    command = [sys.executable, "-c", lowered]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["3000", "65536"]
