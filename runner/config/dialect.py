"""The YAML that is read: a strict part of YAML 1.2, by PyYAML's safe loader.

No aliases, no tags, bounded depth; `yes`, `010` and `1:30` are text, where YAML 1.1 takes them for
a bool, an octal and a sexagesimal number. Files and places are the business of `document`.
"""

import re
from collections.abc import Callable
from typing import Any

import yaml

MAX_DEPTH = 20

_TAG = "tag:yaml.org,2002:"
STRING = _TAG + "str"

_CONVERT: dict[str, Callable[[str], Any]] = {
    _TAG + "null": lambda _: None,
    _TAG + "bool": lambda text: text.lower() == "true",
    _TAG + "int": int,
    _TAG + "float": float,
}


class RefusedError(yaml.MarkedYAMLError):
    """Fine as YAML, but not in this dialect."""


class _Loader(yaml.SafeLoader):
    """The safe loader, less what is refused; its scalars are set below."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            self._refuse(f"the alias *{event.anchor} is not read; write the value out", event)
        if getattr(event, "tag", None) is not None:
            self._refuse(f"the tag {event.tag} is not read; remove it", event)
        if self.depth == MAX_DEPTH:
            self._refuse(f"nested deeper than {MAX_DEPTH} levels", event)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def _refuse(self, problem: str, event: Any) -> None:
        raise RefusedError(problem=problem, problem_mark=event.start_mark)


def _resolve(kind: str, pattern: str, first: str) -> None:
    """Read plain scalars that match `pattern` and start with a character of `first` as `kind`."""
    characters = list(first) or [""]
    _Loader.add_implicit_resolver(_TAG + kind, re.compile(rf"(?:{pattern})$"), characters)


_resolve("null", "", "")
_resolve("null", "~|null|Null|NULL", "~nN")
_resolve("bool", "true|True|TRUE|false|False|FALSE", "tTfF")
# At most 19 digits: Python refuses to convert very long ones. What is longer is read as a float.
_resolve("int", "[-+]?(0|[1-9][0-9]{0,18})", "-+0123456789")
_resolve("float", r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789")


def compose(text: str) -> yaml.Node | None:
    """The tree of nodes of one YAML value; None for an empty text.

    Raises:
        yaml.YAMLError: not YAML, or a part of YAML that this dialect leaves out.
    """
    loader = _Loader(text)
    try:
        return loader.get_single_node()
    finally:
        loader.dispose()


def scalar(node: yaml.Node) -> Any:
    """The Python value of a scalar node."""
    return _CONVERT.get(node.tag, str)(node.value)


def explain(error: yaml.YAMLError) -> str:
    """What is wrong with the YAML, in one line without the place."""
    if isinstance(error, yaml.reader.ReaderError):
        return f"the character {chr(error.character)!a} is not allowed in YAML"
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem is None:
        return f"bad YAML: {error}"
    if isinstance(error, RefusedError):
        return error.problem
    if r"'\t'" in error.problem:
        return "bad YAML: a tab; indent with spaces"
    hint = "; put quotes around a pattern that holds braces" if "'{'" in error.problem else ""
    context = f" ({error.context})" if error.context else ""
    return f"bad YAML: {error.problem}{context}{hint}"
