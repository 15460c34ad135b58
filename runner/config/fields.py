"""Walk the schema: which keys there are, and which field a key means. Knows no key by name."""

from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from runner.config.problems import Loc


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section that a field of this type holds: itself, or nullable, or as entries of a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (section_of(argument) for argument in get_args(annotation))
    return next((section for section in found if section is not None), None)


def literals_of(annotation: Any) -> list[Any]:
    """The values that a `Literal` type allows, in the schema's order; empty for other types."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [value for argument in get_args(annotation) for value in literals_of(argument)]


def section_at(root: type[BaseModel], loc: Loc) -> type[BaseModel] | None:
    """The section at a place of the configuration; list indices are passed over."""
    section: type[BaseModel] | None = root
    for name in loc:
        if isinstance(name, str):
            field = section.model_fields.get(name) if section else None
            section = section_of(field.annotation) if field else None
    return section


def field_at(root: type[BaseModel], loc: Loc) -> FieldInfo | None:
    """The field at a place of the configuration; None for a list's entry and an unknown key."""
    if not loc or not isinstance(loc[-1], str):
        return None
    section = section_at(root, loc[:-1])
    return section.model_fields.get(loc[-1]) if section else None


def walk(section: type[BaseModel], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The way to every key of a section, sections before what they hold."""
    for name, field in section.model_fields.items():
        yield (*above, name)
        below = section_of(field.annotation)
        if below is not None:
            yield from walk(below, (*above, name))
