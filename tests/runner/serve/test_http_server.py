"""The web server itself, by connections of clients that stay open."""

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from http.client import HTTPConnection
from resource import RLIMIT_NOFILE, getrlimit, setrlimit

import pytest
from starlette.responses import PlainTextResponse

from runner.config.schema import ServerConfig
from runner.serve.errors import ApiError
from runner.serve.guard import Guard
from runner.serve.http_server import listen, serving

APP = Guard(PlainTextResponse("here"), key=None, max_bytes=100, shape=ApiError.body)


@pytest.fixture
def few_files() -> Iterator[None]:
    """This process may open 50 more than it has."""
    before = getrlimit(RLIMIT_NOFILE)
    setrlimit(RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 50, before[1]))
    yield
    setrlimit(RLIMIT_NOFILE, before)


def test_answers_wait_for_no_acknowledgement() -> None:
    """Head and body are sent one after the other; a client acknowledges late, after some 40 ms."""
    listener = listen(ServerConfig(port=0))
    with serving(APP, listener, grace_s=lambda: 0.0):
        client = HTTPConnection(*listener.getsockname())
        took_s = []
        for _ in range(20):
            began = time.monotonic()
            client.request("GET", "/")
            assert client.getresponse().read() == b"here"
            took_s.append(time.monotonic() - began)
    assert min(took_s[2:]) < 0.02


def test_a_body_that_is_too_large_is_read_before_it_is_refused() -> None:
    """Else its sender finds the connection reset while it still sends, and no answer."""
    listener = listen(ServerConfig(port=0))
    with serving(APP, listener, grace_s=lambda: 0.0):
        client = HTTPConnection(*listener.getsockname())
        for _ in range(2):
            client.request("POST", "/", b"x" * 20_000_000)
            answer = client.getresponse()
            assert answer.status == 413
            assert b"raise server.max_request_bytes" in answer.read()


@pytest.mark.usefixtures("few_files")
def test_as_many_clients_connect_as_the_host_allows() -> None:
    listener = listen(ServerConfig(port=0))
    with serving(APP, listener, grace_s=lambda: 0.0), ExitStack() as stack:
        for _ in range(200):
            client = stack.enter_context(closing(HTTPConnection(*listener.getsockname())))
            client.request("GET", "/")
            assert client.getresponse().read() == b"here"
