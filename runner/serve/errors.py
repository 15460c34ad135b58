"""What a client is told when its request cannot be answered, in the shape of its API's errors."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

_LOG = logging.getLogger(__name__)

_TYPES = {401: "authentication_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer that is not 200.

    Attributes:
        param: the key of the body that is at fault, if one is.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """In the shape of OpenAI's."""
        kind = _TYPES.get(
            self.status, "server_error" if self.status >= 500 else "invalid_request_error"
        )
        told = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        # What a client sent may hold half a surrogate pair, which no answer can.
        return {"error": {key: value and _whole(value) for key, value in told.items()}}

    def short_body(self) -> dict[str, Any]:
        """In the shape of the Open Inference Protocol's."""
        return {"error": _whole(self.message)}

    def response(self, shape: "Shape") -> JSONResponse:
        return JSONResponse(shape(self), self.status, self.headers)


Shape = Callable[[ApiError], dict[str, Any]]
"""The body of an answer that says what was wrong."""


def _whole(text: str) -> str:
    return text.encode(errors="replace").decode()


def install_handlers(app: FastAPI, shape: Shape) -> None:
    """Let every error of `app` leave in this shape."""

    async def ours(_request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ApiError)
        return error.response(shape)

    async def of_ours(request: Request, error: Exception) -> JSONResponse:
        _LOG.error("%s %s", request.method, request.url.path, exc_info=error)
        return ApiError(500, "a defect of the server; its log says more").response(shape)

    async def of_routing(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        message = f"{request.method} {request.url.path}: {error.detail}"
        return ApiError(error.status_code, message, headers=error.headers).response(shape)

    app.add_exception_handler(ApiError, ours)
    app.add_exception_handler(HTTPException, of_routing)
    app.add_exception_handler(Exception, of_ours)
