"""Judgements of host readings: the bounds, and the exact fix."""

import dataclasses

import pytest

from runner.observe.cgroup import CgroupLimits
from runner.observe.finding import say_bytes
from runner.observe.host import Directory, Space, read_host
from runner.observe.host_checks import (
    GIB,
    MIB,
    judge_cpus,
    judge_home_dir,
    judge_host,
    judge_loopback,
    judge_memlock,
    judge_memory,
    judge_nofile,
    judge_passwd,
    judge_shm,
    judge_socket_dir,
    judge_stack,
    judge_temp_dir,
)

UNLIMITED = CgroupLimits()


@pytest.mark.parametrize(
    ("total_bytes", "num_gpus", "status"),
    [
        (64 * MIB, 2, "error"),
        (64 * MIB, 1, "warning"),
        (64 * MIB, 0, "warning"),
        (256 * MIB - 1, 2, "error"),
        (256 * MIB, 2, "warning"),
        (1 * GIB - 1, 2, "warning"),
        (1 * GIB, 2, "ok"),
    ],
)
def test_shm_bounds(total_bytes: int, num_gpus: int, status: str) -> None:
    space = Space(total_bytes, total_bytes)
    assert judge_shm(space, num_gpus=num_gpus, in_container=True).status == status


def test_shm_fix_is_the_flag_in_a_container_and_a_mount_outside() -> None:
    small = Space(64 * MIB, 64 * MIB)
    inside = judge_shm(small, num_gpus=2, in_container=True)
    outside = judge_shm(small, num_gpus=2, in_container=False)
    assert (inside.fix or "").startswith("docker run --shm-size=1g")
    assert outside.fix == "mount -o remount,size=1G /dev/shm"
    assert "64 MiB" in inside.detail


def test_shm_that_is_full_or_missing() -> None:
    full = judge_shm(Space(8 * GIB, 10 * MIB), num_gpus=2, in_container=True)
    assert full.status == "error"
    assert "ls -l /dev/shm" in (full.fix or "")
    assert judge_shm(None, num_gpus=2, in_container=True).status == "error"


def test_memlock_matters_between_gpus_only() -> None:
    limited = judge_memlock(64 * 1024, num_gpus=2, in_container=True)
    assert (limited.status, limited.fix) == ("warning", "docker run --ulimit memlock=-1")
    assert judge_memlock(64 * 1024, num_gpus=1, in_container=True).status == "ok"
    assert judge_memlock(None, num_gpus=2, in_container=True).status == "ok"


def test_stack() -> None:
    small = judge_stack(1 * MIB, in_container=True)
    assert (small.status, small.fix) == ("warning", "docker run --ulimit stack=67108864")
    assert judge_stack(8 * MIB, in_container=True).status == "ok"
    assert judge_stack(None, in_container=True).status == "ok"


@pytest.mark.parametrize(
    ("limit", "status"),
    [(255, "error"), (256, "warning"), (4095, "warning"), (4096, "ok"), (None, "ok")],
)
def test_nofile_bounds(limit: int | None, status: str) -> None:
    finding = judge_nofile(limit, in_container=True)
    assert finding.status == status
    assert (finding.fix is None) == (status == "ok")


def test_temp_dir_must_work_and_home_dir_should() -> None:
    read_only = Directory("/x", writable=False, space=Space(9 * GIB, 9 * GIB))
    assert judge_temp_dir(read_only, in_container=True).status == "error"
    assert judge_home_dir(read_only, in_container=True).status == "warning"
    assert judge_home_dir(read_only, in_container=True).fix == "docker run -e HOME=/tmp"
    missing = Directory("/x", writable=False, space=None)
    assert "does not exist" in judge_temp_dir(missing, in_container=False).detail


@pytest.mark.parametrize(
    ("free_bytes", "status"),
    [(128 * MIB - 1, "error"), (128 * MIB, "warning"), (2 * GIB - 1, "warning"), (2 * GIB, "ok")],
)
def test_temp_dir_space(free_bytes: int, status: str) -> None:
    directory = Directory("/tmp", writable=True, space=Space(100 * GIB, free_bytes))
    assert judge_temp_dir(directory, in_container=True).status == status


@pytest.mark.parametrize(
    ("directory", "lack"),
    [
        (Directory("/sockets", writable=False, space=Space(GIB, 0)), "is not writable"),
        (Directory("/sockets", writable=False, space=None), "does not exist"),
    ],
)
def test_a_socket_folder_is_made_for_the_group(directory: Directory, lack: str) -> None:
    found = judge_socket_dir(directory, gid=0, in_container=True)
    assert found.status == "error"
    assert found.detail.startswith(f"/sockets {lack}")
    assert found.fix == (
        "on the host, as root: install -d -m 0770 -g 0 FOLDER; docker run -v FOLDER:/sockets   "
        "(compose: volumes: [FOLDER:/sockets])"
    )
    outside = judge_socket_dir(directory, gid=7, in_container=False)
    assert outside.fix == "as root: install -d -m 0770 -g 7 /sockets"


def test_a_full_socket_folder_will_do() -> None:
    directory = Directory("/sockets", writable=True, space=Space(GIB, 0))
    assert judge_socket_dir(directory, gid=0, in_container=True).status == "ok"


def test_a_passwd_line_is_required_by_torch_tensorrt() -> None:
    required = judge_passwd(12345, gid=7, has_line=False, required=True)
    assert required.status == "error"
    assert "shardline:x:12345:7:" in (required.fix or "")
    assert judge_passwd(12345, gid=7, has_line=False, required=False).status == "warning"
    assert judge_passwd(0, gid=0, has_line=True, required=True).status == "ok"


def test_memory_is_what_the_control_group_leaves() -> None:
    group = CgroupLimits(memory_limit_bytes=6 * GIB, memory_used_bytes=3 * GIB)
    finding = judge_memory(64 * GIB, available_bytes=60 * GIB, cgroup=group, num_gpus=1)
    assert finding.status == "warning"
    assert finding.fix == "docker run --memory=4g"
    assert "3.0 GiB available of 64 GiB; control group limit 6.0 GiB" in finding.detail


@pytest.mark.parametrize(
    ("available_gib", "num_gpus", "status"),
    [(0.5, 0, "error"), (3, 0, "warning"), (4, 0, "ok"), (4, 1, "ok"), (31, 8, "warning")],
)
def test_memory_bounds(available_gib: float, num_gpus: int, status: str) -> None:
    finding = judge_memory(
        64 * GIB, available_bytes=int(available_gib * GIB), cgroup=UNLIMITED, num_gpus=num_gpus
    )
    assert finding.status == status


def test_cpus_are_what_the_control_group_leaves() -> None:
    limited = judge_cpus(64, cgroup_cpus=1.5, num_gpus=2)
    assert (limited.status, limited.fix) == ("warning", "docker run --cpus=4")
    assert "control group limit 1.5" in limited.detail
    assert judge_cpus(2, cgroup_cpus=None, num_gpus=0).status == "ok"
    assert judge_cpus(2, cgroup_cpus=8.0, num_gpus=2).fix == "run on a host with 4 cores"


def test_loopback() -> None:
    assert judge_loopback(None).status == "ok"
    broken = judge_loopback("[Errno 99] Cannot assign requested address")
    assert (broken.status, broken.fix) == ("error", "ip link set lo up")
    assert "Errno 99" in broken.detail


def test_every_reading_is_judged() -> None:
    host = dataclasses.replace(read_host(), container=None, has_passwd_line=False, uid=12345)
    findings = {f.check: f for f in judge_host(host, num_gpus=0, needs_passwd=True)}
    assert list(findings) == [
        "container",
        "shm",
        "memlock",
        "stack",
        "nofile",
        "temp_dir",
        "home_dir",
        "passwd",
        "memory",
        "cpus",
        "loopback",
    ]
    assert findings["container"].detail == "none detected"
    assert findings["passwd"].status == "error"


@pytest.mark.parametrize(
    ("num_bytes", "words"),
    [(0, "0 bytes"), (65536, "64 KiB"), (1536 * MIB, "1.5 GiB"), (3 << 40, "3.0 TiB")],
)
def test_sizes_are_said_in_binary_units(num_bytes: int, words: str) -> None:
    assert say_bytes(num_bytes) == words
