"""The backends by the names that the configuration has for them."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from parallel.errors import PreflightError
from runner.compiler.backend import Backend, Caching

AUTO = ("tensorrt", "inductor", "eager")
"""What `auto` tries; of two that are equally fast, the first one is taken."""


def candidates_of(setting: str) -> tuple[str, ...]:
    """The backends that `compile.backend` lets compile a segment."""
    return AUTO if setting == "auto" else (setting,)


class Backends:
    """Makes each backend at its first use, so that one that is not used need not be installed."""

    def __init__(self, device: torch.device, *, checks: bool = True) -> None:
        """
        Args:
            checks: what is built, and what builds it, is tried in another process; False: another
                one does that, or may itself end.
        """
        from runner.compiler.eager import EagerBackend
        from runner.compiler.inductor import InductorBackend
        from runner.compiler.tensorrt import TensorRTBackend

        self._make: dict[str, Callable[[], Backend]] = {
            "eager": EagerBackend,
            "inductor": partial(InductorBackend, device, checks=checks),
            "tensorrt": partial(TensorRTBackend, device, checks=checks),
        }
        self._made: dict[str, Backend] = {}
        self._caches: Path | None = None

    def __getitem__(self, name: str) -> Backend:
        if name not in self._made:
            made = self._make[name]()
            if self._caches and isinstance(made, Caching):
                made.read_caches(self._caches)
            self._made[name] = made
        return self._made[name]

    def read_caches(self, folder: Path) -> None:
        """Let loading begin with what `write_caches` wrote; call it before any backend is used."""
        self._caches = folder

    def write_caches(self, folder: Path) -> None:
        """Keep what the backends made when they loaded their artefacts; some make nothing."""
        for backend in self._made.values():
            if isinstance(backend, Caching):
                backend.write_caches(folder)


def check_backend(name: str, device_type: str) -> None:
    """Find out at once, and without a GPU, whether a backend can build on this host at all.

    Raises:
        PreflightError: names what is missing, and what to do.
    """
    if name == "inductor":
        from runner.compiler.inductor import check_compiler

        check_compiler()
    if name == "tensorrt":
        from runner.compiler.tensorrt_install import find_install

        if device_type == "cpu":
            raise PreflightError(
                "backend tensorrt needs an NVIDIA GPU, and this job is for the CPU; use "
                "--set compile.backend=inductor or eager, or build for a named GPU with "
                "--target sm89 --no-run"
            )
        find_install()
