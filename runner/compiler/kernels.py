"""The Triton kernels that are launched beside the artefacts, among a rank's caches in a bundle.

With them the C module by which Triton launches kernels: so a start compiles neither, and needs no C
compiler. What does not fit this host is not found, and compiled. Where Triton does not work nothing
happens here; `runner.models.attention_choice` says why.
"""

import shutil
from collections.abc import Collection
from pathlib import Path

import torch

from parallel.context import ParallelContext
from parallel.errors import PreflightError
from parallel.low_latency import LowLatency
from runner.compiler.triton_driver import CAUSES, find_obstacle

_FOLDER = "triton"
_LAUNCHER = "cuda_utils"
"""What Triton calls its C module."""
_KEPT = {".cubin", ".json", ".so"}


def watch_kernels(device: torch.device, caches: Path | None = None) -> None:
    """Take part in what Triton looks for; to be called before it starts on a GPU.

    Args:
        caches: a rank's, hashes checked, to be looked through, too.
    """
    if device.type != "cuda":
        return
    try:
        from runner.compiler.triton_cache import KernelCache

        KernelCache.install(caches and caches / _FOLDER)
    except CAUSES:
        return


def check_kernels(context: ParallelContext) -> None:
    """Find out before there is work whether Triton starts, where the ranks cannot do without.

    Raises:
        PreflightError: it does not.
    """
    if not isinstance(context.tp.small_sums, LowLatency):
        return
    if obstacle := find_obstacle():
        raise PreflightError(
            f"distributed.all_reduce: low_latency needs Triton, which does not start ({obstacle}); "
            "set it to auto or one_shot"
        )


def keep_kernels(device: torch.device, kernels: Collection[str], caches: Path) -> None:
    """Copy what a start needs of that which this process has launched since `watch_kernels`.

    Args:
        kernels: names of their functions.
        caches: a rank's, which a bundle will bring.
    """
    if device.type != "cuda":
        return
    try:
        from runner.compiler.triton_cache import KernelCache
    except CAUSES:
        return
    for used in KernelCache.used:
        for file in used.iterdir() if used.is_dir() else ():
            name = file.name.split(".")[0]
            if file.suffix in _KEPT and name in {_LAUNCHER, *kernels}:
                target = caches / _FOLDER / used.name
                target.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target / file.name)
