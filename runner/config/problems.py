"""What is wrong with a configuration, and where: one line a problem, all of them in one error.

Not here: finding the problems; `document`, `settings` and `messages` do that.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from parallel.errors import ConfigError

Loc = tuple[str | int, ...]
"""The way to a value: keys and list indices from the top, such as ("parallel", "stages", 0)."""


class Place(NamedTuple):
    """Where something was written: a file with line and column (from 1), or a flag (line 0)."""

    source: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{self.source}:{self.line}:{self.column}" if self.line else self.source


@dataclass(frozen=True)
class Problem:
    """One thing to repair; `loc` is empty if it is the whole file."""

    place: Place | None
    loc: Loc
    message: str

    def __str__(self) -> str:
        parts = (str(self.place or ""), dotted(self.loc), self.message)
        text = ": ".join(part for part in parts if part)
        # A key may hold a line break or a terminal's control characters.
        return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


class ContradictionError(ValueError):
    """Values that are fine one by one but do not go together; raised by the schema's validators.

    Attributes:
        faults: for each, the way from the validated section, and what is wrong there.
    """

    def __init__(self, faults: list[tuple[Loc, str]]) -> None:
        super().__init__("; ".join(f"{dotted(loc)}: {message}" for loc, message in faults))
        self.faults = faults


def dotted(loc: Loc) -> str:
    """The key as a user writes it for `--set`: `parallel.stages.0.devices`."""
    return ".".join(map(str, loc))


def shown(value: object, limit: int = 80) -> str:
    """A value as a message quotes it: Python's repr, with YAML's null, true and false."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def config_error(problems: Iterable[Problem]) -> ConfigError:
    """One line a problem: those of the file in its order, then flags, then what is missing."""
    ordered = sorted(problems, key=_reading_order)
    return ConfigError("\n".join(dict.fromkeys(map(str, ordered))))


def _reading_order(problem: Problem) -> tuple[int, int, int]:
    if problem.place is None:
        return (2, 0, 0)
    in_file = 0 if problem.place.line else 1
    return (in_file, problem.place.line, problem.place.column)
