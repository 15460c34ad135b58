"""What `shardline plan` needs beside the configuration: the GPUs, and sizes left to choose."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from parallel.errors import ConfigError

if TYPE_CHECKING:
    from runner.config.load import LoadedConfig

_NOT_GIVEN = ("default", "parallel.stages", "parallel.split_points")
"""Origins of sizes that nobody wrote; the last two count the entries of those keys."""


@dataclass(frozen=True)
class Gpus:
    """The GPUs to plan for.

    Attributes:
        count: how many were found; None if nobody looked.
        memory_bytes: of one; None if it is not known.
        origin: where `memory_bytes` comes from.
        absence: why there is nothing to find.
    """

    count: int | None = None
    memory_bytes: int | None = None
    origin: str = "given"
    absence: str = ""

    def describe(self, num_ranks: int) -> list[str]:
        """What a reader of a plan must know of them."""
        notes = []
        if self.memory_bytes is None:
            notes.append(f"Memory is not judged: {self.absence}, and no --gpu-memory-gb is given.")
        if self.count is not None and self.count < num_ranks:
            notes.append(f"The plan takes {num_ranks} GPUs; {self.count} were found here.")
        return notes

    def for_auto(self, count: int | None) -> tuple[int, int]:
        """How many there are, and the memory of each.

        Args:
            count: what --gpus gives.

        Raises:
            ConfigError: one of them is not known.
        """
        num_gpus = count or self.count
        missing = [] if num_gpus else ["--gpus"]
        if not self.memory_bytes:
            missing.append("--gpu-memory-gb")
        if not num_gpus or not self.memory_bytes:
            raise ConfigError(f"--auto needs {' and '.join(missing)} here: {self.absence}")
        return num_gpus, self.memory_bytes


def find_gpus(loaded: "LoadedConfig", gpu_memory_gb: float | None, *, needs_count: bool) -> Gpus:
    """What is given counts; the driver is asked for the rest.

    Raises:
        ConfigError: a memory that is no size.
    """
    device = loaded.config.parallel.device
    if gpu_memory_gb is None:
        return _inventory(device)
    if not (math.isfinite(gpu_memory_gb) and gpu_memory_gb > 0):
        raise ConfigError(f"--gpu-memory-gb={gpu_memory_gb:g}: give a number above 0, such as 80")
    found = _inventory(device) if needs_count else Gpus()
    return replace(found, memory_bytes=int(gpu_memory_gb * 10**9), origin="given")


def refuse_given(loaded: "LoadedConfig", keys: Sequence[str], flag: str, what: str) -> None:
    """Raises ConfigError: one of the keys that `flag` is to choose is given."""
    for key in keys:
        # A list that is given has origins for its entries, not for itself.
        if loaded.origins.get(key, "") not in _NOT_GIVEN:
            raise ConfigError(
                f"{flag} chooses {what}, but {_where(loaded, key)}; drop it, or {flag}"
            )


def _where(loaded: "LoadedConfig", key: str) -> str:
    """A key that is given, and where."""
    origins = [o for k, o in loaded.origins.items() if k == key or k.startswith(f"{key}.")]
    places = [origin for origin in origins if origin != "default"]
    return f"{key} is given" + (f" ({places[0]})" if places else "")


def _inventory(device: str) -> Gpus:
    """The GPUs of this host, unless the job is for a CPU."""
    if device == "cpu":
        return Gpus(absence="parallel.device is cpu")

    from runner.observe.nvml import read_inventory

    inventory = read_inventory()
    sizes = [gpu.memory_total_bytes for gpu in inventory.gpus if gpu.memory_total_bytes]
    if not sizes:
        return Gpus(absence=inventory.reason or "the driver tells the memory of no GPU")
    origin = "the GPU found here" if len(sizes) == 1 else f"the smallest of {len(sizes)} found here"
    return Gpus(len(sizes), min(sizes), origin)
