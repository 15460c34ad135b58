"""A module made by a function that the user names and allows, with weights from a file.

Importing a user's package runs its code: nothing is imported before the reference is found in
`security.factories`. Not here: how a file becomes a state dict.
"""

import importlib
import inspect
import logging
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import nn

from parallel.errors import ConfigError
from runner.sources.meta_build import MetaValuesError, build_on_meta
from runner.sources.state_dict import assign_state_dict
from runner.sources.state_file import read_state_dict

_LOG = logging.getLogger(__name__)
_SEED = 0
_REFERENCE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def open_factory(
    reference: str,
    *,
    arguments: Mapping[str, Any],
    weights: Path | None,
    allowed: Collection[str],
    search_path: Path | None,
) -> nn.Module:
    """Call the factory and load its weights.

    With weights the module is made on the meta device and takes tensors mapped from the file, so
    that only those that are used are read. Where the factory computes values that the file lacks,
    it is made on the CPU.

    Args:
        reference: "package.module:function".
        arguments: keyword arguments of the function.
        weights: see `read_state_dict`; None: as the factory makes them, from the same random
            numbers in every process.
        allowed: `security.factories`.
        search_path: a folder that comes first where modules are looked for.

    Returns:
        In eval mode, on the CPU, no parameter requires a gradient.

    Raises:
        ConfigError: not allowed, cannot be imported, raises, or returns no module.
        IntegrityError: weights that are absent, corrupt, or not those of the module.
    """
    _check_reference(reference, allowed)
    with _searched_first(search_path):
        factory = _import(reference, search_path)
        if weights is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(_SEED)
                return _finished(_call(reference, factory, arguments))
        state = read_state_dict(weights)
        module = _build(reference, factory, arguments)
        assign_state_dict(module, state, file=weights)
    return _finished(module)


def code_file(reference: str) -> Path | None:
    """The file that a factory which was opened is written in; None: it is in no file of its own."""
    name, _, path = reference.partition(":")
    module = sys.modules[name]
    factory = attrgetter(path)(module)
    try:
        found = inspect.getsourcefile(inspect.unwrap(factory))
    except TypeError:  # an object that can be called, such as a partial
        found = getattr(module, "__file__", None)
    return Path(found) if found and Path(found).is_file() else None


def _check_reference(reference: str, allowed: Collection[str]) -> None:
    if not _REFERENCE.fullmatch(reference):
        raise ConfigError(
            f"model.factory: {reference!r} is no reference; write package.module:function"
        )
    if reference not in allowed:
        listed = ", ".join(sorted(allowed)) or "nothing"
        raise ConfigError(
            f"model.factory: {reference} is not allowed, since importing it runs its code; "
            f"security.factories lists {listed}; add it there if you trust it"
        )


@contextmanager
def _searched_first(folder: Path | None) -> Iterator[None]:
    if folder is None:
        yield
        return
    entry = str(folder.resolve())
    sys.path.insert(0, entry)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(entry)


def _import(reference: str, search_path: Path | None) -> Callable[..., object]:
    name, _, path = reference.partition(":")
    try:
        found: Any = importlib.import_module(name)
        for attribute in path.split("."):
            found = getattr(found, attribute)
    except Exception as error:
        where = f" from {search_path}" if search_path else ""
        raise ConfigError(
            f"model.factory: {reference} cannot be imported{where} ({_brief(error)}); install its "
            "package, or name the folder that it lies in as model.factory_path"
        ) from error
    if not callable(found):
        raise ConfigError(f"model.factory: {reference} is no function")
    return found  # type: ignore[no-any-return]  # what `callable` has shown


def _call(
    reference: str, factory: Callable[..., object], arguments: Mapping[str, Any]
) -> nn.Module:
    try:
        module = factory(**arguments)
    except Exception as error:
        given = ", ".join(f"{name}={value!r}" for name, value in arguments.items()) or "nothing"
        raise ConfigError(
            f"model.factory: {reference} raised {_brief(error)}; it was given {given}"
        ) from error
    if not isinstance(module, nn.Module):
        raise ConfigError(
            f"model.factory: {reference} returned a {type(module).__name__}; an nn.Module is wanted"
        )
    return module


def _build(
    reference: str, factory: Callable[..., object], arguments: Mapping[str, Any]
) -> nn.Module:
    try:
        return build_on_meta(lambda: _call(reference, factory, arguments))
    except MetaValuesError as error:
        _LOG.info("%s is built on the CPU: %s", reference, error)
    except ConfigError as error:
        _LOG.info("%s is built on the CPU, for on the meta device: %s", reference, error)
    return _call(reference, factory, arguments)


def _finished(module: nn.Module) -> nn.Module:
    return module.eval().requires_grad_(False).to(torch.device("cpu"))


def _brief(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
