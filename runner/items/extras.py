"""The libraries that only some kinds of items need, and what to install where one is missing."""

import importlib
from collections.abc import Iterable
from types import ModuleType

from parallel.errors import PreflightError
from runner.items.item import Item, Kind

_EXTRAS: dict[Kind, tuple[str, str, str]] = {
    "image": ("PIL.Image", "Pillow", "images"),
    "volume": ("nibabel", "nibabel", "volumes"),
}


def require_extras(items: Iterable[Item]) -> None:
    """Find a missing library before the run begins.

    Raises:
        PreflightError: an item is of a kind whose library is not installed.
    """
    for kind in sorted({item.kind for item in items} & _EXTRAS.keys()):
        import_extra(kind)


def import_extra(kind: Kind) -> ModuleType:
    """The module that reads a kind.

    Raises:
        PreflightError: it is not installed.
    """
    module, library, extra = _EXTRAS[kind]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise PreflightError(
            f"items of kind {kind} need {library}, which cannot be imported ({error}); "
            f"pip install shardline[{extra}]"
        ) from error
