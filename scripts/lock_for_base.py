"""Print what one base image installs of a lock: markers are decided for its Python, hashes stay.

pip decides markers by the Python that runs it, even where it downloads for another one. A lock that
pins a single build of torch is refused for any other Python. Not here: resolving (`scripts/lock`).
"""

import argparse
import re
import sys
from pathlib import Path

from packaging.markers import Marker

_PIN = re.compile(
    r"^(?P<name>[a-z0-9-]+)==(?P<version>[^\s;]+) *(?:; (?P<marker>[^\\\n]+))?\\\n"
    r"(?P<hashes>(?: +--hash=\S+(?: \\)?\n)+)",
    re.MULTILINE,
)
_ONE_BUILD = ("3.11", "x86_64")
"""Of torch, where `scripts/lock` had a folder of wheels and not PyTorch's index."""


def select(lock: str, *, python: str, machine: str) -> str:
    """The pins that apply, without markers.

    Args:
        python: the full version of the base's CPython, such as 3.12.3.
        machine: as `uname -m` says it.

    Raises:
        ValueError: a line is no pin with hashes, or torch is pinned for another Python or machine
            alone.
    """
    minor = python.rpartition(".")[0]
    environment = {
        "implementation_name": "cpython",
        "implementation_version": python,
        "os_name": "posix",
        "platform_machine": machine,
        "platform_python_implementation": "CPython",
        "platform_system": "Linux",
        "python_full_version": python,
        "python_version": minor,
        "sys_platform": "linux",
    }
    chosen = []
    pins = list(_PIN.finditer(lock))
    num_lines = sum(line[:1] not in ("", " ", "#") for line in lock.splitlines())
    if len(pins) != num_lines:
        raise ValueError(f"{num_lines} packages, of which {len(pins)} are pinned with hashes")
    for pin in pins:
        if pin["marker"] and not Marker(pin["marker"]).evaluate(environment):
            continue
        is_one_build = pin["name"] == "torch" and pin["hashes"].count("--hash") == 1
        if is_one_build and (minor, machine) != _ONE_BUILD:
            raise ValueError(
                f"torch {pin['version']} is pinned for Python 3.11 on x86-64 alone, and the base "
                f"has Python {minor} on {machine}; use a base with Python 3.11, such as "
                "debian:bookworm-slim, or pin all builds, with PyTorch's index: scripts/lock cpu"
            )
        chosen.append(f"{pin['name']}=={pin['version']} \\\n{pin['hashes']}")
    return "".join(chosen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("lock", type=Path)
    for name in ("python", "machine"):
        parser.add_argument(f"--{name}", required=True)
    given = parser.parse_args()
    try:
        sys.stdout.write(select(given.lock.read_text(), python=given.python, machine=given.machine))
    except ValueError as error:
        sys.stderr.write(f"{given.lock.name}: {error}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
