"""The web server in a thread of its own, beside the engine's."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread

import uvicorn
from starlette.types import ASGIApp

from parallel.errors import ConfigError

_LAST_WORDS_S = 2
"""How long answers that are under way have to be sent at the end."""


def listen(host: str, port: int) -> socket.socket:
    """A socket that clients can connect to.

    Raises:
        ConfigError: the address is taken, or none of this host's.
    """
    try:
        return socket.create_server((host, port), family=_family(host), backlog=2048)
    except OSError as error:
        raise ConfigError(
            f"server: cannot listen at {host} port {port} ({error.strerror or error}); use another "
            "--port or --host"
        ) from None


@contextmanager
def serving(app: ASGIApp, listener: socket.socket) -> Iterator[None]:
    """Answer clients while the body runs, and what is under way after it."""
    config = uvicorn.Config(
        app, log_level="warning", lifespan="off", timeout_graceful_shutdown=_LAST_WORDS_S
    )
    server = uvicorn.Server(config)
    # Signals are the engine's business; a server outside the main thread leaves them alone.
    thread = Thread(target=server.run, kwargs={"sockets": [listener]}, name="http", daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.should_exit = True
        thread.join(_LAST_WORDS_S + 3)


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
