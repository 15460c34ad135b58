"""The Triton kernels that are launched beside the artefacts, among a rank's caches in a bundle.

With them the C module by which Triton launches kernels: so a start compiles neither, and needs no C
compiler. What does not fit this host is not found, and compiled.
"""

import shutil
from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path

import torch

_FOLDER = "triton"
_LAUNCHER = "cuda_utils"
"""What Triton calls its C module."""
_KEPT = {".cubin", ".json", ".so"}


def watch_kernels(device: torch.device, caches: Path | None = None) -> None:
    """Take part in what Triton looks for; to be called before it starts on a GPU.

    Args:
        caches: a rank's, hashes checked, in which to look first.
    """
    if _has_kernels(device):
        from runner.compiler.triton_cache import KernelCache

        KernelCache.install(caches and caches / _FOLDER)


def keep_kernels(device: torch.device, kernels: Collection[str], caches: Path) -> None:
    """Copy what a start needs of that which was launched since `watch_kernels`.

    Args:
        kernels: names of their functions.
        caches: a rank's, which a bundle will bring.
    """
    if not _has_kernels(device):
        return
    from runner.compiler.triton_cache import KernelCache

    for used in KernelCache.used:
        for file in used.iterdir():
            name = file.name.split(".")[0]
            if file.suffix in _KEPT and name in {_LAUNCHER, *kernels}:
                target = caches / _FOLDER / used.name
                target.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target / file.name)


def _has_kernels(device: torch.device) -> bool:
    return device.type == "cuda" and find_spec("triton") is not None
