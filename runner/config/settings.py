"""Raw configuration in layers: the file, then flags, then `--set`; each value keeps its place.

Nothing is validated here but the way to a value; types and names are the schema's.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from runner.config.dialect import explain
from runner.config.document import Document, parse
from runner.config.problems import Loc, Place, Problem, shown

OVERRIDE = "--set"


@dataclass(frozen=True)
class Flag:
    """A command-line flag that stands for a key of the configuration.

    Attributes:
        name: as the user writes it, such as `--tensor-parallel-size`.
        value: what was given; None if the flag was not.
    """

    name: str
    value: Any


class Settings:
    """The data of a `Document`, into which flags and overrides are put.

    Attributes:
        data: plain nested data, not validated.
        keys, values: the place of each key and of each value.
        problems: what cannot be put anywhere.
    """

    def __init__(self, document: Document) -> None:
        self.data: dict[str, Any] = document.data
        self.keys = document.keys
        self.values = document.values
        self.problems = document.problems

    def put_flag(self, key: str, flag: Flag) -> None:
        """Set a dotted key to what the flag says; a flag that was not given changes nothing."""
        if flag.value is not None:
            self._put(key.split("."), flag.value, Place(flag.name))

    def put_override(self, override: str) -> None:
        """Apply one `a.b=value` of `--set`; the value is YAML; the key may hold list indices."""
        place = Place(OVERRIDE)
        key, equals, text = override.partition("=")
        path = key.strip().split(".")
        if not equals or not all(path):
            message = f"{override!r} is not of the form key=value, such as model.dtype=bfloat16"
        elif not text.strip():
            message = f"{key.strip()} has no value; write null for none"
        else:
            self._put_yaml(path, text, place)
            return
        self.problems.append(Problem(place, (), message))

    def _put_yaml(self, path: list[str], text: str, place: Place) -> None:
        try:
            document = parse(text, OVERRIDE)
        except yaml.YAMLError as error:
            self.problems.append(Problem(place, tuple(path), explain(error)))
            return
        self.problems += [Problem(place, (*path, *p.loc), p.message) for p in document.problems]
        self._put(path, document.data, place)

    def _put(self, path: list[str], value: Any, place: Place) -> None:
        container: Any = self.data
        loc: Loc = ()
        for depth, name in enumerate(path):
            rest = path[depth + 1 :]
            obstacle = _obstacle(container, name, rest)
            if obstacle is not None:
                self.problems.append(Problem(place, loc, obstacle))
                return
            step = int(name) if isinstance(container, list) else name
            loc = (*loc, step)
            if not rest or (isinstance(container, dict) and step not in container):
                container[step] = _nested(rest, value)
                self._record(loc, tuple(rest), value, place)
                return
            container = container[step]

    def _record(self, made: Loc, rest: Loc, value: Any, place: Place) -> None:
        """`made` is the first part of the way that was new; from there on all of it is."""
        loc = (*made, *rest)
        for places in (self.keys, self.values):
            for old in [known for known in places if known[: len(loc)] == loc]:
                del places[old]
        # A section of the top level has no place: what is missing in it is not this value's fault.
        new = (loc[:length] for length in range(max(2, len(made)), len(loc)))
        for below in (*new, *_locs(value, loc)):
            self.keys[below] = self.values[below] = place


def _obstacle(container: Any, name: str, rest: list[str]) -> str | None:
    """Why `name` cannot be taken from `container`, or None if it can."""
    if isinstance(container, dict):
        if name not in container and any(part.isdecimal() for part in rest):
            return f"{name} is not set, so it has no entry to change; set the whole list"
        return None
    if not isinstance(container, list):
        return f"is {shown(container)}, so there is no {name} in it"
    if name not in map(str, range(len(container))):
        indices = f"0 to {len(container) - 1}" if container else "none, for it is empty"
        return f"no entry {name!r} in this list; its indices are {indices}"
    return None


def _nested(path: list[str], value: Any) -> Any:
    for name in reversed(path):
        value = {name: value}
    return value


def _locs(value: Any, loc: Loc) -> Iterator[Loc]:
    yield loc
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from _locs(item, (*loc, key))
