"""The backends by the names that the configuration has for them."""

from collections.abc import Callable
from functools import partial

import torch

from runner.compiler.backend import Backend


class Backends:
    """Makes each backend at its first use, so that one that is not used need not be installed."""

    def __init__(self, device: torch.device) -> None:
        from runner.compiler.eager import EagerBackend
        from runner.compiler.inductor import InductorBackend
        from runner.compiler.tensorrt import TensorRTBackend

        self._make: dict[str, Callable[[], Backend]] = {
            "eager": EagerBackend,
            "inductor": partial(InductorBackend, device),
            "tensorrt": partial(TensorRTBackend, device),
        }
        self._made: dict[str, Backend] = {}

    def __getitem__(self, name: str) -> Backend:
        if name not in self._made:
            self._made[name] = self._make[name]()
        return self._made[name]
