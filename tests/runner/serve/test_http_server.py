"""The web server itself, by connections of a client that stay open."""

import time
from http.client import HTTPConnection

from starlette.responses import PlainTextResponse

from runner.config.schema import ServerConfig
from runner.serve.errors import ApiError
from runner.serve.guard import Guard
from runner.serve.http_server import listen, serving


def test_answers_wait_for_no_acknowledgement() -> None:
    """Head and body are sent one after the other; a client acknowledges late, after some 40 ms."""
    listener = listen(ServerConfig(port=0))
    app = Guard(PlainTextResponse("here"), key=None, max_bytes=100, shape=ApiError.body)
    with serving(app, listener, grace_s=lambda: 0.0):
        client = HTTPConnection(*listener.getsockname())
        took_s = []
        for _ in range(20):
            began = time.monotonic()
            client.request("GET", "/")
            assert client.getresponse().read() == b"here"
            took_s.append(time.monotonic() - began)
    assert min(took_s[2:]) < 0.02
