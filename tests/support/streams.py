"""Streams of a server, read to their end by a thread each, and how each of them ended."""

import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
from servers import Server

FULL = 2300
"""Tokens, each with its probabilities of 1.6 kB, that fill what Linux lets a connection hold back:
3 MB where the reader has room for little.
"""


@dataclass
class Stream:
    """Attributes:
    events: what came, without the [DONE] at the end.
    broken: the connection was cut.
    """

    events: list[dict[str, Any]] = field(default_factory=list)
    broken: bool = False

    @property
    def error(self) -> str | None:
        """What the last event says went wrong."""
        return self.events[-1].get("error", {}).get("message") if self.events else None

    @property
    def finish_reason(self) -> str | None:
        """Of the last event."""
        choices = self.events[-1].get("choices") if self.events else None
        return choices[0]["finish_reason"] if choices else None

    def read(self, url: str, prompt: str, max_tokens: int) -> "Stream":
        """Ask, and read until there is no more."""
        body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "stream": True}
        try:
            with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
                for line in answer.iter_lines():
                    if line.startswith("data: {"):
                        self.events.append(json.loads(line.removeprefix("data: ")))
        except httpx.TransportError:
            self.broken = True
        return self


@contextmanager
def silent_stream(server: Server, max_tokens: int) -> Iterator[socket.socket]:
    """A connection that has asked for a stream and reads nothing by itself; the body runs when more
    has been said to it than the buffers of both ends hold.
    """
    host, port = server.url.removeprefix("http://").split(":")
    chat = {"messages": [{"role": "user", "content": "slow"}], "max_tokens": max_tokens}
    body = json.dumps(chat | {"stream": True, "logprobs": True, "top_logprobs": 20})
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    with socket.socket() as silent:
        silent.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        silent.connect((host, int(port)))
        before = server.metric("generation_tokens_total")
        silent.sendall(f"{head}Connection: close\r\n\r\n{body}".encode())
        deadline = time.monotonic() + 90
        while server.metric("generation_tokens_total") < before + FULL:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield silent


@contextmanager
def streaming(server: Server, number: int, *, max_tokens: int) -> Iterator[list[Future[Stream]]]:
    """So many streams, all of which have got text when the body runs."""
    streams = [Stream() for _ in range(number)]
    with ThreadPoolExecutor(number) as pool:
        reading = [
            pool.submit(stream.read, server.url, f"{n}", max_tokens)
            for n, stream in enumerate(streams)
        ]
        deadline = time.monotonic() + 60
        while not all(stream.events for stream in streams):
            assert time.monotonic() < deadline, [len(stream.events) for stream in streams]
            time.sleep(0.02)
        yield reading
