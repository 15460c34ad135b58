"""The one place where onnx and onnx2torch are imported.

Not here: what they are used for.
"""

import importlib
import importlib.util
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from parallel.errors import PreflightError

_INSTALL = "pip install shardline[onnx]"
_NEED_TORCHVISION = ("NonMaxSuppression", "RoiAlign")


def import_onnx() -> Any:
    """The package `onnx`.

    Raises:
        PreflightError: it is not installed.
    """
    return _import("onnx")


def import_onnx2torch() -> Any:
    """The package `onnx2torch`, its converters registered.

    Two of its converters import torchvision, for RoiAlign and NonMaxSuppression alone. Where it is
    not installed an empty module stands in for it while they are imported, and
    `operators_without_torchvision` names them.

    Raises:
        PreflightError: it is not installed.
    """
    with _torchvision_or_stand_in():
        return _import("onnx2torch")


def operators_without_torchvision() -> tuple[str, ...]:
    """The operators that onnx2torch cannot run on this host."""
    return () if importlib.util.find_spec("torchvision") else _NEED_TORCHVISION


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise PreflightError(
            f"an ONNX model needs the package {name}, which cannot be imported ({error}); run "
            f"{_INSTALL}"
        ) from None


@contextmanager
def _torchvision_or_stand_in() -> Iterator[None]:
    if "torchvision" in sys.modules or not operators_without_torchvision():
        yield
        return
    package, ops = types.ModuleType("torchvision"), types.ModuleType("torchvision.ops")
    vars(package)["ops"], vars(ops)["roi_align"] = ops, None
    sys.modules |= {"torchvision": package, "torchvision.ops": ops}
    try:
        yield
    finally:
        del sys.modules["torchvision"], sys.modules["torchvision.ops"]
