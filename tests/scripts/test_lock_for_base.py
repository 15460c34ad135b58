"""`scripts/lock_for_base.py`: a base's own Python decides what is fetched for it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from processes import ROOT


def ask(flavour: str, python: str, machine: str = "x86_64") -> subprocess.CompletedProcess[str]:
    script, lock = ROOT / "scripts" / "lock_for_base.py", ROOT / "docker" / "locks" / flavour
    command = [sys.executable, script, lock, "--python", python, "--machine", machine]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("python", "has_resources"), [("3.11.2", True), ("3.12.3", False), ("3.13.0", False)]
)
def test_markers_are_decided_for_the_base_not_for_this_python(
    python: str, has_resources: bool
) -> None:
    lines = ask("rtx.txt", python).stdout.splitlines()
    pins = [line.partition("==")[0] for line in lines if re.match("[a-z]", line)]
    assert len(pins) == len(set(pins)), "two versions of one package"
    assert {"numpy", "networkx", "torch", "triton"} <= set(pins)
    assert ("importlib-resources" in pins) == has_resources
    assert not any(";" in line for line in lines)


def test_every_pin_keeps_its_hashes() -> None:
    lock = (ROOT / "docker" / "locks" / "rtx.txt").read_text()
    found = ask("rtx.txt", "3.12.3").stdout
    numpy = lock[lock.index("numpy==2.5.5") :].partition("\\\n")[2]
    assert f"numpy==2.5.5 \\\n{numpy[: re.search('^[a-z]', numpy, re.M).start()]}" in found


def test_a_line_that_is_no_pin_is_not_left_out(tmp_path: Path) -> None:
    lock = tmp_path / "lock.txt"
    pinned = (ROOT / "docker" / "locks" / "build.txt").read_text()
    lock.write_text(f"{pinned}torch @ https://example.invalid/torch.whl\n")
    done = ask(str(lock), "3.12.3")
    assert (done.returncode, done.stdout) == (2, "")
    assert "2 packages, of which 1 are pinned" in done.stderr


@pytest.mark.parametrize(("python", "machine"), [("3.12.3", "x86_64"), ("3.11.2", "aarch64")])
def test_one_build_of_torch_is_refused_for_another_base(python: str, machine: str) -> None:
    assert ask("cpu.txt", "3.11.2").returncode == 0
    done = ask("cpu.txt", python, machine)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "is pinned for Python 3.11 on x86-64 alone" in done.stderr
    assert "debian:bookworm-slim" in done.stderr
