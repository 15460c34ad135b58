"""What a job may see of its host, settled before anything of it runs: GPUs and the network."""

import os
import re
from typing import TYPE_CHECKING

from parallel.errors import ConfigError, PreflightError

if TYPE_CHECKING:
    from runner.config.schema import RunnerConfig

_DEVICE = re.compile(r"[0-9]+|(GPU|MIG)-[0-9a-fA-F]+(-[0-9a-fA-F]+)*(/[0-9]+/[0-9]+)?")


def show_devices(listed: str | None) -> None:
    """Let this process and its ranks see these GPUs only; device 0 is then the first of them.

    Args:
        listed: with commas between: indices or UUIDs (GPU-...); or one MIG id (MIG-...); None: no
            change.

    Raises:
        ConfigError: an entry is none of these, or is given twice; a MIG id is not alone.
    """
    if listed is None:
        return
    devices = [word.strip() for word in listed.split(",")]
    for word in devices:
        if not _DEVICE.fullmatch(word):
            raise ConfigError(
                f"--devices {listed}: {word!r} is no GPU; use indices such as 0,1, or what "
                "`nvidia-smi -L` shows: GPU-..., MIG-..."
            )
    if len(set(devices)) != len(devices):
        raise ConfigError(f"--devices {listed}: a GPU is given twice; name each once")
    if len(devices) > 1 and any(word.startswith("MIG-") for word in devices):
        raise ConfigError(
            f"--devices {listed}: CUDA shows a process one MIG instance and nothing beside it; "
            "name one alone, for a job of one rank"
        )
    # By the bus, as nvidia-smi counts, not by speed.
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(devices)


def guard(config: "RunnerConfig") -> None:
    """Guard the network of this process and its ranks as the configuration says.

    Raises:
        PreflightError: the report cannot be written.
    """
    from runner.observe.network_guard import guard_network

    security = config.security
    try:
        guard_network(security.network_guard, report=security.network_report)
    except OSError as error:
        raise PreflightError(
            f"security.network_report: cannot write {security.network_report}: {error.strerror}; "
            "name a file in a folder that can be written"
        ) from None
