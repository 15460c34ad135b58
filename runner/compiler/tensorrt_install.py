"""Which flavour of TensorRT is installed: the standard one or RTX.

Their Torch-TensorRT packages share an import name, so the flavour is read from the metadata of what
is installed. Not here: `torch_tensorrt` itself; `tensorrt` imports it.
"""

import importlib
from dataclasses import dataclass
from importlib import metadata
from types import ModuleType
from typing import Literal

from parallel.errors import PreflightError
from runner.observe.software import distributions_by_name, find_distributions, find_flavour

Flavour = Literal["standard", "rtx"]

_MODULES: dict[Flavour, str] = {"standard": "tensorrt", "rtx": "tensorrt_rtx"}

_INSTALL = (
    "pip install 'shardline[rtx]' (torch-tensorrt-rtx and tensorrt-rtx, from PyPI) or "
    "pip install 'shardline[tensorrt]' (torch-tensorrt and tensorrt, from NVIDIA's index)"
)


@dataclass(frozen=True)
class Install:
    """The one flavour that this environment holds, and its versions."""

    flavour: Flavour
    torch_tensorrt: str
    tensorrt: str


def find_install() -> Install:
    """What is installed. Imports TensorRT, not Torch-TensorRT; needs no driver.

    Raises:
        PreflightError: neither flavour is installed, both are, or TensorRT itself is absent.
    """
    distributions = find_distributions(distributions_by_name(metadata.distributions()))
    flavour = find_flavour(distributions)
    if flavour == "none":
        raise PreflightError(
            f"compile.backend: tensorrt needs Torch-TensorRT, which is not installed; {_INSTALL}; "
            "or set compile.backend to inductor"
        )
    if flavour == "both":
        raise PreflightError(
            "torch-tensorrt and torch-tensorrt-rtx are both installed and overwrite each other; "
            "pip uninstall torch-tensorrt torch-tensorrt-rtx, then install one of them"
        )
    package = "torch-tensorrt-rtx" if flavour == "rtx" else "torch-tensorrt"
    return Install(flavour, distributions[package], import_tensorrt(flavour).__version__)


def import_tensorrt(flavour: Flavour) -> ModuleType:
    """The Python API of a flavour: the module `tensorrt` or `tensorrt_rtx`.

    Raises:
        PreflightError: it is absent or does not import.
    """
    name = _MODULES[flavour]
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:
        raise PreflightError(
            f"the module {name} does not import ({error}); pip install --force-reinstall "
            f"{name.replace('_', '-')}"
        ) from error


def describe_targets() -> list[str]:
    """The GPUs that TensorRT-RTX builds for on a host without one: ["sm75", "sm80", ...]."""
    capabilities = import_tensorrt("rtx").ComputeCapability.__members__
    return [name.lower() for name in capabilities if name.startswith("SM")]
