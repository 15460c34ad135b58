"""Read a YAML file as plain data that remembers the line and column of each key and value.

Which YAML is read is said in `dialect`, what the keys mean in `schema`.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from parallel.errors import ConfigError
from runner.config.dialect import STRING, compose, explain, scalar
from runner.config.problems import Loc, Place, Problem, config_error

MAX_BYTES = 1 << 20


@dataclass
class Document:
    """Plain data, and the place of each key and of each value by the way to it.

    Attributes:
        source: the file, as a message names it.
        problems: keys that cannot stand; they are left out of `data`.
    """

    source: str
    data: Any = None
    keys: dict[Loc, Place] = field(default_factory=dict)
    values: dict[Loc, Place] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def read(path: Path) -> Document:
    """Read a configuration file.

    Raises:
        ConfigError: the file is absent, unreadable, longer than 1 MiB, not UTF-8, not YAML, empty,
            or not a mapping.
    """
    text = _text(path)
    try:
        document = parse(text, str(path))
    except yaml.YAMLError as error:
        place = _place_of(error, text, str(path))
        raise config_error([Problem(place, (), explain(error))]) from error
    if document.data is None:
        raise _file_error(path, "empty; it needs at least version and model.path")
    if not isinstance(document.data, dict):
        message = "the file must be a mapping of keys, such as `version: 1`"
        raise config_error([Problem(document.values[()], (), message)])
    return document


def parse(text: str, source: str) -> Document:
    """Read one YAML value of any kind.

    Raises:
        yaml.YAMLError: as `dialect.compose`.
    """
    document = Document(source)
    node = compose(text)
    if node is not None:
        document.data = _value(node, (), document)
    return document


def _value(node: yaml.Node, loc: Loc, document: Document) -> Any:
    document.values[loc] = _place(node.start_mark, document.source)
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, loc, document)
    if isinstance(node, yaml.SequenceNode):
        return [_value(item, (*loc, index), document) for index, item in enumerate(node.value)]
    return scalar(node)


def _mapping(node: yaml.MappingNode, loc: Loc, document: Document) -> dict[str, Any]:
    """PyYAML would let the last of two equal keys win; here the second one is a problem."""
    mapping: dict[str, Any] = {}
    for key_node, value_node in node.value:
        place = _place(key_node.start_mark, document.source)
        if key_node.tag != STRING:
            document.problems.append(Problem(place, loc, "a key must be text; put it in quotes"))
            continue
        key = (*loc, key_node.value)
        if key in document.keys:
            line = document.keys[key].line
            document.problems.append(Problem(place, key, f"given before, in line {line}; keep one"))
            continue
        document.keys[key] = place
        mapping[key_node.value] = _value(value_node, key, document)
    return mapping


def _place(mark: Any, source: str) -> Place:
    return Place(source, mark.line + 1, mark.column + 1)


def _place_of(error: yaml.YAMLError, text: str, source: str) -> Place:
    if isinstance(error, yaml.reader.ReaderError):
        before = text[: error.position]
        return Place(source, before.count("\n") + 1, error.position - before.rfind("\n"))
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    return _place(mark, source) if mark else Place(source)


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except IsADirectoryError as error:
        raise _file_error(path, "is a directory; give a YAML file") from error
    except FileNotFoundError as error:
        raise _file_error(path, "no such file; give the path of a YAML file") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise _file_error(path, f"cannot be read: {reason}") from error
    if len(content) > MAX_BYTES:
        raise _file_error(path, f"longer than {MAX_BYTES} bytes; this is not a configuration file")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        message = f"not UTF-8 (byte {content[error.start]:#04x} in line {line}); save it as UTF-8"
        raise _file_error(path, message) from error


def _file_error(path: Path, message: str) -> ConfigError:
    return config_error([Problem(Place(str(path)), (), message)])
