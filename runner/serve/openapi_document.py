"""The OpenAPI document: routes that read their bodies themselves say here what these may hold."""

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

_REFERENCE = "#/components/schemas/{model}"


class ErrorDetails(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every answer that is an error."""

    error: ErrorDetails


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": says}
    for status, says in {
        400: "the request cannot be answered",
        401: "no key, or a wrong one",
        404: "there is no such model",
        408: "the request took longer than its timeout",
        413: "the body is too large",
        429: "the queue is full",
        503: "the server is starting, draining or shutting down",
    }.items()
}
"""What the routes of requests answer beside 200."""


def takes(body: type[BaseModel]) -> dict[str, Any]:
    """What a route's `openapi_extra` is, where it parses such a body itself."""
    schema = {"$ref": _REFERENCE.format(model=body.__name__)}
    content = {"application/json": {"schema": schema}}
    return {"requestBody": {"content": content, "required": True}}


def publish_bodies(app: FastAPI, bodies: Sequence[type[BaseModel]]) -> None:
    """Let the document of `app` hold the schemas of bodies that `takes` refers to."""
    of_routes = app.openapi

    def document() -> dict[str, Any]:
        whole = of_routes()
        pairs = [(body, "validation") for body in bodies]
        _, schemas = models_json_schema(pairs, ref_template=_REFERENCE)  # type: ignore[arg-type]
        whole["components"]["schemas"].update(schemas["$defs"])
        return whole

    app.openapi = document  # type: ignore[method-assign]
