"""The host that a program measures from, and the commit of the source tree."""

import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any


def read_host() -> dict[str, Any]:
    """Plain JSON types; null where something is not there or not known."""
    return {
        "shardline": version("shardline"),
        "commit": read_commit(Path(__file__).parents[2]),
        "python": platform.python_version(),
        "cpu": _cpu_model(),
        "num_cpus": len(os.sched_getaffinity(0)),
    }


def version(distribution: str) -> str | None:
    """None where it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def read_commit(tree: Path) -> str | None:
    """The commit of a checkout, with `-dirty` where tracked files differ from it; None where the
    tree is no checkout or git is not there.
    """
    if not (tree / ".git").exists() or shutil.which("git") is None:
        return None
    command = ["git", "-C", str(tree), "describe", "--always", "--dirty", "--abbrev=12"]
    # --exclude: a tag's name would stand in the commit's place.
    done = subprocess.run([*command, "--exclude=*"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def _cpu_model() -> str | None:
    """Not all architectures name it."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return None
