"""A state dict's tensors become a module's, strictly: all of them, no others, of the same shapes.

Not here: reading them.
"""

import difflib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import nn

from parallel.errors import IntegrityError


def assign_state_dict(module: nn.Module, state: Mapping[str, torch.Tensor], *, file: Path) -> None:
    """Give the module the tensors themselves, with no copy and in their own dtypes.

    A parameter that the module has under several names stays one parameter, and the file may hold
    it under any of them.

    Raises:
        IntegrityError: a tensor is missing, unexpected, or of another shape or kind of number.
    """
    wanted = module.state_dict(keep_vars=True)
    aliases = _aliases(wanted)
    _check_names(wanted, state, aliases, file)
    for name, tensor in state.items():
        _check_tensor(name, wanted[name], tensor, file)
    assigned: dict[str, torch.Tensor] = {}
    for names in aliases:
        stored = next(state[name] for name in reversed(names) if name in state)
        is_parameter = isinstance(wanted[names[0]], nn.Parameter)
        shared = nn.Parameter(stored, requires_grad=False) if is_parameter else stored
        assigned |= dict.fromkeys(names, shared)
    module.requires_grad_(False).load_state_dict(assigned, strict=True, assign=True)


def _aliases(wanted: Mapping[str, torch.Tensor]) -> list[list[str]]:
    """The names of each tensor of the module."""
    names = defaultdict(list)
    for name, tensor in wanted.items():
        names[id(tensor)].append(name)
    return list(names.values())


def _check_names(
    wanted: Mapping[str, torch.Tensor],
    state: Mapping[str, torch.Tensor],
    aliases: Iterable[list[str]],
    file: Path,
) -> None:
    missing = [names[0] for names in aliases if not any(name in state for name in names)]
    unexpected = [name for name in state if name not in wanted]
    if missing:
        near = _nearest(missing[0], unexpected or list(state))
        raise IntegrityError(
            f"{file}: tensor {missing[0]} is missing{_others(missing)}; {near}; give the weights "
            "of this model, or change its arguments"
        )
    if unexpected:
        raise IntegrityError(
            f"{file}: the model has no tensor {unexpected[0]}{_others(unexpected)}; "
            f"{_nearest(unexpected[0], list(wanted), where='the model')}; give the weights of this "
            "model, or change its arguments"
        )


def _others(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _nearest(name: str, names: list[str], *, where: str = "the file") -> str:
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
    return f"the nearest name that {where} has is {near[0]}" if near else f"{where} has none"


def _check_tensor(name: str, wanted: torch.Tensor, stored: torch.Tensor, file: Path) -> None:
    if wanted.shape != stored.shape:
        raise IntegrityError(
            f"{file}: tensor {name} has shape {list(stored.shape)}, the model wants "
            f"{list(wanted.shape)}"
        )
    if _kind(wanted) != _kind(stored):
        raise IntegrityError(
            f"{file}: tensor {name} is {_kind(stored)}, the model wants {_kind(wanted)}"
        )


def _kind(tensor: torch.Tensor) -> str:
    """Floating dtypes may differ, they stay as stored; a whole number is no fraction."""
    if tensor.is_floating_point():
        return "of floating point"
    return "complex" if tensor.is_complex() else str(tensor.dtype).removeprefix("torch.")
