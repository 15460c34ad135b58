"""A state dict from a file, mapped into memory so that only what is used is read.

A pickle is read by torch's restricted unpickler alone, which makes tensors and plain containers and
calls nothing else. Not here: whether the tensors fit a module.
"""

import logging
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from parallel.errors import ConfigError, IntegrityError

_LOG = logging.getLogger(__name__)
_PICKLED = (".pt", ".pth")
_NESTED = ("state_dict", "model")


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors, .pt or .pth file by name, on the CPU, in their stored dtypes.

    Args:
        path: a .pt or .pth holds the state dict itself, or a dict with it under "state_dict" or
            "model".

    Raises:
        ConfigError: a file of another kind.
        IntegrityError: absent, truncated, no state dict, or a pickle that holds more than tensors.
    """
    if path.suffix not in (".safetensors", *_PICKLED):
        raise ConfigError(f"{path}: weights are a .safetensors, .pt or .pth file; convert it")
    if not path.is_file():
        raise IntegrityError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    return _state_dict_of(path, _unpickle(path))


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, framework="pt", device="cpu") as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise IntegrityError(f"{path}: truncated or corrupt ({error}); copy it again") from None


def _unpickle(path: Path) -> object:
    mapped = _is_zip(path)
    if not mapped:
        _LOG.warning("%s: of torch's format before 1.6; it is read whole, not mapped", path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped or None)
    except pickle.UnpicklingError as error:
        raise IntegrityError(
            f"{path}: {_reason(error)}; unpickling anything but tensors and plain containers can "
            "run code of the file, so it is refused; where you trust the file, convert it with "
            "safetensors.torch.save_file(model.state_dict(), 'model.safetensors')"
        ) from None
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise IntegrityError(f"{path}: truncated or corrupt ({_reason(error)})") from None


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _reason(error: Exception) -> str:
    """What was found, without torch's advice to load it unsafely."""
    found = str(error).partition("WeightsUnpickler error: ")
    lines = (found[2] or found[0]).strip().splitlines()
    return lines[0].partition(" Please ")[0].rstrip(". ") if lines else type(error).__name__


def _state_dict_of(path: Path, content: object) -> dict[str, torch.Tensor]:
    if isinstance(content, Mapping):
        candidates: list[Any] = [content, *(content.get(key) for key in _NESTED)]
        for candidate in candidates:
            if _is_state_dict(candidate):
                return dict(candidate)
    raise IntegrityError(
        f"{path}: holds no state dict; a dict of tensors by name is wanted, at the top or under "
        f"{' or '.join(map(repr, _NESTED))}"
    )


def _is_state_dict(candidate: Any) -> bool:
    return (
        isinstance(candidate, Mapping)
        and bool(candidate)
        and all(isinstance(name, str) for name in candidate)
        and all(isinstance(tensor, torch.Tensor) for tensor in candidate.values())
    )
