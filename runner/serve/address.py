"""Where a server listens: said by it where others of its container find it, and asked by them."""

import os
import socket
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

_FILE = "SHARDLINE_ADDRESS_FILE"
_DEFAULT = "http://127.0.0.1:8000"


def tell_address(address: str) -> None:
    """Write an address into the file that the environment names, if it names one.

    Args:
        address: http://HOST:PORT or unix:PATH.
    """
    if file := os.environ.get(_FILE):
        Path(file).write_text(f"{address}\n", encoding="utf-8")


def known_address() -> str:
    """The address that a server told last, or the default one."""
    file = os.environ.get(_FILE)
    if file and Path(file).exists():
        return Path(file).read_text(encoding="utf-8").strip()
    return _DEFAULT


def ask(address: str, path: str, *, timeout_s: float) -> tuple[int, str]:
    """GET a path.

    Returns:
        The status and the body.

    Raises:
        OSError: nobody answers, or not in time.
        ValueError: the address is of neither form.
    """
    if address.startswith("unix:"):
        connection: HTTPConnection = _UnixConnection(address.removeprefix("unix:"), timeout_s)
    else:
        parts = urlsplit(address)
        if parts.scheme != "http" or not parts.hostname:
            raise ValueError(f"{address!r} is no address; use http://HOST:PORT or unix:PATH")
        connection = HTTPConnection(parts.hostname, parts.port or 80, timeout=timeout_s)
        path = parts.path.rstrip("/") + path
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode(errors="replace")
    finally:
        connection.close()


class _UnixConnection(HTTPConnection):
    def __init__(self, path: str, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)
