"""Where a measurement was made: versions, devices, and the commit of the source tree."""

import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from runner.bench.measure import device_of
from runner.observe.nvml import read_inventory
from runner.observe.software import read_software
from runner.planning import DecoderJob


def read_environment(job: DecoderJob) -> dict[str, Any]:
    """Plain JSON types; null where something is not there or not known."""
    software = read_software()
    on_gpu = device_of(job).type == "cuda"
    return {
        "shardline": _version("shardline"),
        "commit": read_commit(Path(__file__).parents[2]),
        "python": platform.python_version(),
        "torch": software.torch_version,
        "cuda": software.torch_cuda,
        "nccl": software.nccl_version,
        "tensorrt": software.distributions,
        "gpus": [torch.cuda.get_device_name(i) for i in job.plan.devices] if on_gpu else [],
        "driver": read_inventory().driver_version if on_gpu else None,
        "cpu": _cpu_model(),
        "num_cpus": len(os.sched_getaffinity(0)),
        "num_threads": torch.get_num_threads(),
    }


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


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str | None:
    """Not all architectures name it."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return None
