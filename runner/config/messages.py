"""From what pydantic reports to one plain sentence a problem: what was given, what is allowed."""

import re
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from runner.config.fields import field_at, literals_of
from runner.config.problems import ContradictionError, Loc, shown
from runner.config.suggest import meant_key, meant_value

_WANTED = {
    "bool_type": "true or false",
    "dict_type": "a mapping",
    "float_type": "a number",
    "int_type": "a whole number",
    "list_type": "a list",
    "model_type": "a mapping of keys",
    "string_type": "a string",
}
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?")
_KINDS: dict[type, str] = {
    str: "a string",
    list: "a list",
    dict: "a mapping",
    float: "a number with a fraction",
    int: "a whole number",
}


def explain(error: ValidationError, root: type[BaseModel]) -> Iterator[tuple[Loc, str]]:
    """For each problem the way to it and the sentence that says what it is.

    Args:
        error: what validating `root` raised.
        root: the schema, from which names, allowed values and descriptions are taken.
    """
    for details in error.errors(include_url=False):
        loc = details["loc"]
        reason = details.get("ctx", {}).get("error")
        if isinstance(reason, ContradictionError):
            yield from ((loc + below, message) for below, message in reason.faults)
        elif details["type"] == "missing":
            yield from _missing(root, loc)
        else:
            yield loc, _sentence(details, reason, root)


def _missing(root: type[BaseModel], loc: Loc) -> Iterator[tuple[Loc, str]]:
    """A section that is missing is reported by the required keys in it."""
    field = field_at(root, loc)
    section = field.annotation if field else None
    if not (isinstance(section, type) and issubclass(section, BaseModel)):
        words = (field.description or "").split() if field else []
        description = " ".join(words).rstrip(".")
        yield loc, f"missing; it is needed: {description[:1].lower()}{description[1:]}"
        return
    for name, below in section.model_fields.items():
        if below.is_required():
            yield from _missing(root, (*loc, name))


def _sentence(details: ErrorDetails, reason: Any, root: type[BaseModel]) -> str:
    kind, given, limits = details["type"], details["input"], details.get("ctx", {})
    if kind == "extra_forbidden":
        return f"unknown key; {meant_key(root, details['loc'])}"
    if kind == "literal_error":
        return _not_allowed(given, _literals(root, details["loc"]))
    if kind == "value_error":
        return str(reason)
    if kind in _WANTED:
        return _wrong_type(given, _WANTED[kind] + _or_null(root, details["loc"]))
    return _out_of_bounds(kind, given, limits) or f"{shown(given)}: {details['msg']}"


def _out_of_bounds(kind: str, given: Any, limits: dict[str, Any]) -> str | None:
    if kind == "string_too_short":
        return "empty; give a value"
    if kind in ("too_short", "too_long"):
        return _wrong_length(given, limits)
    if kind == "finite_number":
        return f"{shown(given)} is not finite; use a number"
    if kind == "greater_than_equal":
        return f"{shown(given)} is too small; use {limits['ge']:g} or more"
    if kind == "greater_than":
        return f"{shown(given)} is too small; use a number above {limits['gt']:g}"
    if kind == "less_than_equal":
        return f"{shown(given)} is too large; use {limits['le']:g} or less"
    if kind == "less_than":
        return f"{shown(given)} is too large; use a number below {limits['lt']:g}"
    return None


def _wrong_length(given: Any, limits: dict[str, Any]) -> str:
    least, most = limits.get("min_length"), limits.get("max_length")
    if not given:
        return f"empty; give at least {'one' if least == 1 else least}"
    wanted = f"at most {most}" if least is None else f"at least {least}"
    return f"{shown(given)} has the wrong length, {len(given)}; give {wanted}"


def _literals(root: type[BaseModel], loc: Loc) -> list[Any]:
    field = field_at(root, loc)
    return literals_of(field.annotation) if field else []


def _not_allowed(given: Any, allowed: list[Any]) -> str:
    words = [str(word) for word in allowed]
    choices = f"{', '.join(words[:-1])} or {words[-1]}" if len(words) > 1 else "".join(words)
    near = meant_value(given, allowed)
    hint = f"; did you mean {near}?" if near else ""
    return f"{shown(given)} is not allowed; use {choices}{hint}"


def _wrong_type(given: Any, wanted: str) -> str:
    if given is None:
        return f"null is not allowed; use {wanted}"
    kind = "true or false" if isinstance(given, bool) else _KINDS.get(type(given), "a value")
    quoted = isinstance(given, str) and "number" in wanted and _NUMBER.fullmatch(given)
    return f"{shown(given)} is {kind}; use {wanted}{', without quotes' if quoted else ''}"


def _or_null(root: type[BaseModel], loc: Loc) -> str:
    field = field_at(root, loc)
    nullable = field is not None and type(None) in getattr(field.annotation, "__args__", ())
    return " or null" if nullable else ""
