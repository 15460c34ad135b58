"""Control group limits, read from directories laid out as the kernel lays them out."""

import os
from pathlib import Path

import pytest

from runner.observe.cgroup import (
    CgroupLimits,
    parse_memberships,
    parse_mounts,
    read_cgroup_limits,
)

MIB = 1 << 20
V2_MOUNT = "30 25 0:27 / /sys/fs/cgroup ro,nosuid shared:4 - cgroup2 cgroup rw,nsdelegate\n"


def lay_out(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_memberships_of_both_versions() -> None:
    text = "4:cpu,cpuacct:/a\n2:name=systemd:/b\n0::/user.slice/with:colon\n"
    assert parse_memberships(text) == {
        "cpu": "/a",
        "cpuacct": "/a",
        "name=systemd": "/b",
        "": "/user.slice/with:colon",
    }


def test_mounts_with_and_without_optional_fields() -> None:
    text = (
        "24 27 0:6 / /dev rw - devtmpfs devtmpfs rw\n"
        "35 31 0:32 /docker/abc /sys/fs/cgroup/memory rw master:9 - cgroup cgroup rw,memory\n"
    )
    mounts = parse_mounts(text + V2_MOUNT)
    assert mounts["memory"] == ("/sys/fs/cgroup/memory", "/docker/abc")
    assert mounts[""] == ("/sys/fs/cgroup", "/")


def test_version_2_takes_the_tightest_limit_above_the_process(tmp_path: Path) -> None:
    top = "sys/fs/cgroup"
    lay_out(
        tmp_path,
        {
            "proc/self/cgroup": "0::/outer/inner\n",
            "proc/self/mountinfo": V2_MOUNT,
            f"{top}/outer/memory.max": f"{512 * MIB}\n",
            f"{top}/outer/memory.current": f"{300 * MIB}\n",
            f"{top}/outer/memory.stat": f"anon 5\ninactive_file {100 * MIB}\n",
            f"{top}/outer/cpu.max": "150000 100000\n",
            f"{top}/outer/inner/memory.max": "max\n",
            f"{top}/outer/inner/cpu.max": "max 100000\n",
        },
    )
    limits = read_cgroup_limits(tmp_path)
    assert limits == CgroupLimits(512 * MIB, 200 * MIB, 1.5)
    assert limits.memory_free_bytes == 312 * MIB


def test_version_1_in_a_container_that_sees_the_host_path(tmp_path: Path) -> None:
    lay_out(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n",
            "proc/self/mountinfo": (
                "35 31 0:32 /docker/abc /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n"
                "36 31 0:33 /docker/abc /sys/fs/cgroup/cpu ro - cgroup cgroup rw,cpu,cpuacct\n"
            ),
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{256 * MIB}\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{10 * MIB}\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
    )
    assert read_cgroup_limits(tmp_path) == CgroupLimits(256 * MIB, 10 * MIB, 0.5)


def test_version_1_without_limits(tmp_path: Path) -> None:
    lay_out(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/\n3:cpu:/\n",
            "proc/self/mountinfo": (
                "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
                "36 31 0:33 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"
            ),
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
    )
    assert read_cgroup_limits(tmp_path) == CgroupLimits()


def test_a_host_without_control_groups(tmp_path: Path) -> None:
    assert read_cgroup_limits(tmp_path) == CgroupLimits()
    assert CgroupLimits().memory_free_bytes is None


@pytest.mark.skipif(not Path("/proc/self/cgroup").exists(), reason="no control groups")
def test_this_host_is_readable() -> None:
    limits = read_cgroup_limits()
    assert limits.memory_limit_bytes is None or limits.memory_limit_bytes > MIB
    assert limits.num_cpus is None or 0 < limits.num_cpus <= 16 * (os.cpu_count() or 1)
