"""Frozen dataclasses from plain JSON values, strictly: nothing is converted, ignored or filled in.

The way out is `dataclasses.asdict`. Not here: files, and what the values mean.
"""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from parallel.errors import IntegrityError

Record = TypeVar("Record")

_MAX_SHOWN = 60
_NEEDED = {
    int: "a whole number",
    float: "a finite number",
    str: "a string",
    bool: "true or false",
}

_Reader = Callable[[Any], Any]


def read_record(kind: type[Record], value: Any, path: str) -> Record:
    """The dataclass that `value`, an object of a JSON file, stands for.

    Fields may be numbers, strings, booleans, `Literal`, `X | None`, tuples, dicts whose keys are
    strings or whole numbers, dataclasses, and `Any`.

    Args:
        path: what messages put before a key: "plan" makes it plan.ranks[0].

    Raises:
        IntegrityError: a key is missing, unknown or of another type; names it.
    """
    anything: Any = kind
    try:
        record: Record = _reader(anything)(value)
    except _RefusedError as refused:
        raise IntegrityError(
            f"{path}{''.join(reversed(refused.steps))} {refused.problem}"
        ) from None
    return record


class _RefusedError(Exception):
    """A value that cannot be right.

    Attributes:
        steps: the way to it, innermost first; filled in on the way out, so that values that are
            right cost nothing.
    """

    def __init__(self, problem: str, *steps: str) -> None:
        super().__init__(problem)
        self.problem = problem
        self.steps = list(steps)


@cache
def _reader(kind: Any) -> _Reader:
    """A function that takes a JSON value and returns one of `kind`."""
    if kind is Any:
        return lambda value: value
    if is_dataclass(kind):
        return _fields_reader(kind)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is tuple:
        return _tuple_reader(arguments)
    if origin is dict:
        return _dict_reader(*arguments)
    if origin in (Union, UnionType):
        return _union_reader(arguments)
    if origin is Literal:
        return _literal_reader(arguments)
    return _scalar_reader(kind)


def _fields_reader(kind: Any) -> _Reader:
    hints = get_type_hints(kind)
    readers = {field.name: _reader(hints[field.name]) for field in fields(kind)}

    def read(value: Any) -> Any:
        _check_type(value, dict, "an object")
        if value.keys() != readers.keys():
            for name in sorted(value.keys() - readers.keys()):
                raise _RefusedError("is no key that belongs there", f".{name}")
            for name in sorted(readers.keys() - value.keys()):
                raise _RefusedError("is missing", f".{name}")
        return kind(**_read_all(((n, readers[n], value[n]) for n in readers), ".{}"))

    return read


def _tuple_reader(kinds: tuple[Any, ...]) -> _Reader:
    """`tuple[X, ...]` of any length, or one kind for every item."""
    if kinds[-1] is Ellipsis:
        any_item = _reader(kinds[0])

        def read_any(value: Any) -> tuple[Any, ...]:
            _check_type(value, list, "a list")
            items = ((index, any_item, item) for index, item in enumerate(value))
            return tuple(_read_all(items, "[{}]").values())

        return read_any

    readers = [_reader(kind) for kind in kinds]

    def read(value: Any) -> tuple[Any, ...]:
        if type(value) is not list or len(value) != len(readers):
            raise _wrong(value, f"a list of {len(readers)} items")
        items = zip(range(len(readers)), readers, value, strict=True)
        return tuple(_read_all(items, "[{}]").values())

    return read


def _dict_reader(key_kind: Any, kind: Any) -> _Reader:
    item = _reader(kind)

    def read(value: Any) -> dict[Any, Any]:
        _check_type(value, dict, "an object")
        found = _read_all(((key, item, value[key]) for key in value), "[{}]")
        return {_key(key): found[key] for key in found} if key_kind is int else found

    return read


def _key(text: str) -> int:
    """JSON spells a number that is a key as a string."""
    if not (text.isdecimal() and str(int(text)) == text):
        raise _RefusedError(f"has the key {json.dumps(text)}; it must be a whole number")
    return int(text)


def _union_reader(kinds: tuple[Any, ...]) -> _Reader:
    """`X | None`, or one of several scalars."""
    options = [kind for kind in kinds if kind is not NoneType]
    only = _reader(options[0]) if len(options) == 1 else None

    def read(value: Any) -> Any:
        if value is None and NoneType in kinds:
            return None
        if only:
            return only(value)
        if type(value) in options:
            return value
        raise _wrong(value, " or ".join(_NEEDED[kind] for kind in options))

    return read


def _literal_reader(allowed: tuple[Any, ...]) -> _Reader:
    def read(value: Any) -> Any:
        # 1 equals True, so the types are compared, too.
        if any(type(value) is type(option) and value == option for option in allowed):
            return value
        raise _wrong(value, " or ".join(map(json.dumps, allowed)))

    return read


def _scalar_reader(kind: Any) -> _Reader:
    def read(value: Any) -> Any:
        # `type`, because a boolean is an instance of int.
        if type(value) is kind and (kind is not float or math.isfinite(value)):
            return value
        if kind is float and type(value) is int:
            return float(value)
        raise _wrong(value, _NEEDED[kind])

    return read


def _read_all(items: Iterable[tuple[Any, _Reader, Any]], step: str) -> dict[Any, Any]:
    """Read (key, reader, value) one after the other; `step` is how a path names a key."""
    found = {}
    key = None
    try:
        for key, read, value in items:
            found[key] = read(value)
    except _RefusedError as refused:
        refused.steps.append(step.format(key))
        raise
    return found


def _check_type(value: Any, kind: type, needed: str) -> None:
    if type(value) is not kind:
        raise _wrong(value, needed)


def _wrong(value: Any, needed: str) -> _RefusedError:
    shown = json.dumps(value)
    if len(shown) > _MAX_SHOWN:
        shown = f"{shown[:_MAX_SHOWN]}..."
    return _RefusedError(f"is {shown}; it must be {needed}")
