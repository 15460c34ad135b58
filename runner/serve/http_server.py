"""The web server in a thread of its own, beside the engine's."""

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from errno import EADDRINUSE
from pathlib import Path
from resource import RLIM_INFINITY, RLIMIT_NOFILE, getrlimit, setrlimit
from threading import Thread

import uvicorn

from parallel.errors import ConfigError
from runner.config.schema import ServerConfig
from runner.serve.guard import Guard

_BACKLOG = 2048
_MOST_FILES = 65536
_LAST_WORDS_S = 2
"""How long clients have in any case to read what they are told at the end."""
_LOOK_S = 0.05


def listen(config: ServerConfig) -> socket.socket:
    """A socket that clients can connect to.

    Raises:
        ConfigError: the address is taken, or none of this host's.
    """
    if config.uds is not None:
        return _listen_unix(Path(config.uds))
    host, port = config.host, config.port
    try:
        listener = socket.create_server((host, port), family=_family(host), backlog=_BACKLOG)
    except OSError as error:
        raise ConfigError(
            f"server: cannot listen at {host} port {port} ({error.strerror or error}); use another "
            "server.port or server.host"
        ) from None
    # Connections inherit it. A small answer, and each token of a stream, would else wait until the
    # client has acknowledged what came before, which clients put off for 40 ms.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def address_of(listener: socket.socket) -> str:
    """As clients are told it: http://HOST:PORT, or unix:PATH."""
    if listener.family == socket.AF_UNIX:
        return f"unix:{listener.getsockname()}"
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def forget(address: str) -> None:
    """Leave no file of a Unix socket."""
    if address.startswith("unix:"):
        Path(address.removeprefix("unix:")).unlink(missing_ok=True)


def _listen_unix(path: Path) -> socket.socket:
    """At a file, which whoever may write to it may connect to: that is left to its folder."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_left_over(path)
        listener.bind(str(path))
        path.chmod(0o666)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"server: cannot listen at {path} ({error.strerror or error}); use a path of at most "
            "107 bytes, in a folder that can be written, that no other server has"
        ) from None
    return listener


def _remove_left_over(path: Path) -> None:
    """The file of a server that was killed; one that answers keeps its own.

    Raises:
        OSError: a server answers there, or it is no socket.
    """
    if not path.is_socket():
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
        try:
            asking.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
    raise OSError(EADDRINUSE, os.strerror(EADDRINUSE))


@contextmanager
def serving(app: Guard, listener: socket.socket, *, grace_s: Callable[[], float]) -> Iterator[None]:
    """Answer clients while the body runs, and what is under way after it.

    Args:
        grace_s: called when the body has ended well: how long clients may take to read what they
            have not read yet.
    """
    config = uvicorn.Config(
        app, log_level="warning", lifespan="off", timeout_graceful_shutdown=_LAST_WORDS_S
    )
    _allow_connections()
    server = uvicorn.Server(config)
    # Signals are the engine's business; a server outside the main thread leaves them alone.
    thread = Thread(target=server.run, kwargs={"sockets": [listener]}, name="http", daemon=True)
    thread.start()
    try:
        yield
        while app.num_answering and grace_s() > 0:
            time.sleep(_LOOK_S)
    finally:
        server.should_exit = True
        thread.join(_LAST_WORDS_S + 3)


def _allow_connections() -> None:
    """Each is a file, of which a process may open 1,024 as most hosts are set up, and more if it
    asks.
    """
    soft, hard = getrlimit(RLIMIT_NOFILE)
    wanted = _MOST_FILES if hard == RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft != RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):  # A host may forbid it.
            setrlimit(RLIMIT_NOFILE, (wanted, hard))


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
