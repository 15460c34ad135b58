"""What every request must pass: its key, and the size of its body."""

import hmac
from pathlib import Path

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from parallel.errors import ConfigError
from runner.serve.errors import ApiError, Shape

_MOST_DISCARDED = 1 << 26
"""Bytes beyond what a body may have that are read, so that its sender comes to read the answer."""

_OPEN = ("/health/", "/v2/health/", "/static/")
"""Paths that tell nothing of requests, and nothing of the model."""


def read_key(file: str | None) -> str | None:
    """The key that clients must send; None: none.

    Raises:
        ConfigError: the file cannot be read, or holds no key.
    """
    if file is None:
        return None
    try:
        key = Path(file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"server.api_key_file: cannot read {file}: {error}") from None
    if not key:
        raise ConfigError(f"server.api_key_file: {file} is empty; write the key into it")
    return key


class Guard:
    """Refuses requests before a route sees them; health and the empty page need no key.

    Attributes:
        num_answering: requests that are here whole and whose answers have not been read.
    """

    def __init__(self, app: ASGIApp, *, key: str | None, max_bytes: int, shape: Shape) -> None:
        """
        Args:
            max_bytes: of a request's body.
            shape: of what it refuses with.
        """
        self._app = app
        self._key = key
        self._max_bytes = max_bytes
        self._shape = shape
        self.num_answering = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._check_key(scope)
            whole = await self._whole(receive)
            self.num_answering += 1
            try:
                await self._app(scope, whole, send)
            finally:
                self.num_answering -= 1
        except ApiError as error:
            await error.response(self._shape)(scope, receive, send)

    def _check_key(self, scope: Scope) -> None:
        path = scope["path"]
        if self._key is None or path == "/" or path.startswith(_OPEN):
            return
        sent = dict(scope["headers"]).get(b"authorization", b"")
        if not hmac.compare_digest(sent, f"Bearer {self._key}".encode()):
            raise ApiError(401, "no key, or a wrong one; send Authorization: Bearer KEY")

    async def _whole(self, receive: Receive) -> Receive:
        """The body read to its end, so that no route reads more than it may."""
        parts: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                break
            part = message.get("body", b"")
            size += len(part)
            if size <= self._max_bytes:
                parts.append(part)
            if size > self._max_bytes + _MOST_DISCARDED or not message.get("more_body"):
                break
        if size > self._max_bytes:
            raise ApiError(
                413,
                f"the body is larger than {self._max_bytes} bytes; send less at once, or raise "
                "server.max_request_bytes",
            )
        told = [{"type": "http.request", "body": b"".join(parts), "more_body": False}]

        async def again() -> Message:
            return told.pop() if told else await receive()

        return again
