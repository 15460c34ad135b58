"""Cores next to a device, of a tree that is laid out as /sys is."""

from pathlib import Path

import pytest

from runner.observe.numa import cores_near, parse_cpu_list


def test_the_cores_of_a_device(tmp_path: Path) -> None:
    device = tmp_path / "sys/bus/pci/devices/0000:1b:00.0"
    device.mkdir(parents=True)
    (device / "local_cpulist").write_text("0-3,8-9,16\n")
    assert cores_near("0000:1B:00.0", root=tmp_path) == {0, 1, 2, 3, 8, 9, 16}


def test_a_device_that_the_kernel_does_not_know(tmp_path: Path) -> None:
    assert cores_near("0000:00:00.0", root=tmp_path) == set()


@pytest.mark.parametrize(("text", "cores"), [("", set()), ("5", {5}), ("0-1,3\n", {0, 1, 3})])
def test_lists_of_the_kernel(text: str, cores: set[int]) -> None:
    assert parse_cpu_list(text) == cores
