"""One object of a JSON file, read key by key: a value that cannot be right is an error that names
the file and the key.

Not here: which keys there are; each reader knows its own.
"""

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallel.errors import IntegrityError

_MAX_COUNT = 2**31 - 1
_MAX_SHOWN = 60


@dataclass(frozen=True)
class JsonValues:
    """An object, and where it stands.

    A key that is absent and one that is null read alike. Where a method takes several keys, the
    first that has a value is read.

    Attributes:
        path: what messages put before a key: "" for the file's outermost object, "rope_scaling."
            for one inside it.
    """

    file: Path
    values: Mapping[str, Any]
    path: str = ""

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def count(self, *keys: str, default: int | None = None, least: int = 1) -> int:
        """A whole number of at least `least`; 300.0 is none.

        Raises:
            IntegrityError: it is missing and has no default, or it is something else.
        """
        key, value = self._first(keys, default)
        if type(value) is not int or not least <= value <= _MAX_COUNT:
            raise self.wrong(key, f"a whole number from {least} to {_MAX_COUNT}")
        return value

    def positive(
        self, *keys: str, default: float | None = None, above: float = 0, most: float = math.inf
    ) -> float:
        """A finite number above `above` and at most `most`.

        Raises:
            IntegrityError: it is missing and has no default, or it is something else.
        """
        key, value = self._first(keys, default)
        if not _is_between(value, above, most):
            limit = f" and at most {most:g}" if most < math.inf else ""
            raise self.wrong(key, f"a number above {above:g}{limit}")
        return float(value)

    def flag(self, key: str, *, default: bool) -> bool:
        """Raises IntegrityError: it is neither true nor false."""
        _, value = self._first((key,), default)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def text(self, *keys: str, default: str | None = None) -> str:
        """Raises IntegrityError: it is missing and has no default, or it is no string."""
        key, value = self._first(keys, default)
        if not isinstance(value, str):
            raise self.wrong(key, "a string")
        return value

    def texts(self, key: str, *, default: list[str]) -> list[str]:
        """Raises IntegrityError: it is no list of strings."""
        _, value = self._first((key,), default)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.wrong(key, "a list of strings")
        return value

    def positives(self, key: str, *, length: int) -> list[float]:
        """Raises IntegrityError: it is no list of `length` finite numbers above 0."""
        value = self.values.get(key)
        if (
            not isinstance(value, list)
            or len(value) != length
            or not all(_is_between(item, 0, math.inf) for item in value)
        ):
            raise self.wrong(key, f"a list of {length} numbers above 0")
        return value

    def section(self, *keys: str) -> "JsonValues":
        """An object inside this one, empty where there is none.

        Raises:
            IntegrityError: it is no object.
        """
        key, value = self._first(keys, {})
        if not isinstance(value, dict):
            raise self.wrong(key, "an object")
        return JsonValues(self.file, value, f"{self.path}{key}.")

    def wrong(self, key: str, needed: str) -> IntegrityError:
        """The error of a key whose value is not what is needed."""
        value = self.values.get(key)
        shown = "missing" if value is None else json.dumps(value)
        if len(shown) > _MAX_SHOWN:
            shown = f"{shown[:_MAX_SHOWN]}..."
        return IntegrityError(f"{self.file}: {self.path}{key} is {shown}; it must be {needed}")

    def _first(self, keys: tuple[str, ...], default: Any) -> tuple[str, Any]:
        """The first of `keys` that has a value, and the value; else all keys, and the default."""
        key = next((key for key in keys if self.has(key)), None)
        return (" or ".join(keys), default) if key is None else (key, self.values[key])


def _is_between(value: Any, above: float, most: float) -> bool:
    """A finite number in the range; neither a boolean, NaN nor an integer beyond every float."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return above < value <= most and value <= sys.float_info.max
