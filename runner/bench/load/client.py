"""A client of one server of OpenAI's API: it sends a request as a stream and notes when what came.

It talks to the URL that it is given, and to no proxy.
"""

import json
import os
import time
from collections.abc import AsyncIterator, Mapping
from functools import partial
from typing import Any

import aiohttp

from parallel.errors import ConfigError, PreflightError
from runner.bench.load.data import Body
from runner.bench.load.timeline import Timeline

_DETAIL_LENGTH = 300


class Client:
    """Sends requests to `url`, which ends before `/v1`."""

    def __init__(
        self, url: str, *, model: str, key: str | None, timeout_s: float, extra: Mapping[str, Any]
    ) -> None:
        """
        Args:
            model: empty: the first one that the server names; known after `check`.
            timeout_s: without a byte from the server.
            extra: keys of every request's body.
        """
        self.url = url.rstrip("/").removesuffix("/v1")
        self.model = model
        self._extra = dict(extra)
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._timeout_s = timeout_s

    async def __aenter__(self) -> "Client":
        waits = {"sock_connect": self._timeout_s, "sock_read": self._timeout_s}
        self._http = aiohttp.ClientSession(
            headers=self._headers,
            timeout=aiohttp.ClientTimeout(total=None, **waits),
            connector=aiohttp.TCPConnector(limit=0),
            json_serialize=partial(json.dumps, separators=(",", ":")),
        )
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self._http.close()

    async def check(self) -> None:
        """See that the server is there, takes the key, and has the model.

        Raises:
            ConfigError: the URL, the key or the model is wrong.
            PreflightError: nobody answers, or something that is not such a server.
        """
        address = f"{self.url}/v1/models"
        try:
            async with self._http.get(address) as answer:
                status, content = answer.status, await answer.read()
        except (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError):
            raise ConfigError(f"--url {self.url} is no URL of HTTP; use http://HOST:PORT") from None
        except (aiohttp.ClientError, TimeoutError) as error:
            raise PreflightError(
                f"no server answers at {self.url} ({_reason(error)}); start one, or change --url"
            ) from None
        if status in (401, 403):
            raise ConfigError(
                f"{self.url} refuses the key (HTTP {status}); give the right one by --key-file"
            )
        names = _names(address, status, content)
        if self.model and self.model not in names:
            raise ConfigError(f"--model {self.model}: the server has {', '.join(names)}")
        self.model = self.model or names[0]

    async def send(self, body: Body, *, due_at: float) -> Timeline:
        """One request to its end; an error is a part of what is returned."""
        timeline = Timeline(due_at, time.perf_counter())
        try:
            await self._stream(body, timeline)
        except (aiohttp.ClientError, TimeoutError) as error:
            timeline.error = _kind(error)
            timeline.detail = str(error)[:_DETAIL_LENGTH]
        timeline.ended_at = time.perf_counter()
        if timeline.error is None and not timeline.chunks_at:
            timeline.chunks_at.append(timeline.ended_at)
        return timeline

    async def _stream(self, body: Body, timeline: Timeline) -> None:
        route = "chat/completions" if "messages" in body else "completions"
        options = {"stream": True, "stream_options": {"include_usage": True}}
        sent = {"model": self.model, **body, **options, **self._extra}
        async with self._http.post(f"{self.url}/v1/{route}", json=sent) as answer:
            if answer.status != 200:
                timeline.error = f"HTTP {answer.status}"
                timeline.detail = _message(await answer.read())
                return
            timeline.error = "incomplete stream"
            async for event in _events(answer):
                if event is None:
                    timeline.error = None  # What is read to its end leaves its connection open.
                elif "error" in event:
                    timeline.error = "error in stream"
                    timeline.detail = str(event["error"])[:_DETAIL_LENGTH]
                    return
                else:
                    _note(event, timeline)


async def _events(answer: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any] | None]:
    """The JSON of each event; None at the end of a complete stream."""
    async for line in _lines(answer):
        if not line.startswith(b"data:"):
            continue
        data = line.removeprefix(b"data:").strip()
        if data == b"[DONE]":
            yield None
            continue
        event = _loads(data)
        yield event if isinstance(event, dict) else {"error": data.decode(errors="replace")}


async def _lines(answer: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """Of any length, which aiohttp's own may not have."""
    rest = b""
    async for part in answer.content.iter_any():
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            yield line
    yield rest


def _note(event: dict[str, Any], timeline: Timeline) -> None:
    """Take down when text came, and how many tokens the server counts."""
    for choice in event.get("choices") or ():
        delta = choice.get("delta") or {}
        if choice.get("text") or delta.get("content") or delta.get("reasoning_content"):
            timeline.chunks_at.append(time.perf_counter())
            break
    if usage := event.get("usage"):
        timeline.prompt_tokens = usage.get("prompt_tokens")
        timeline.output_tokens = usage.get("completion_tokens")


def _names(address: str, status: int, content: bytes) -> list[str]:
    """Raises PreflightError: it is not ready, or no server of this kind."""
    listing = _loads(content)
    data = listing.get("data") if isinstance(listing, dict) else None
    models = data if status == 200 and isinstance(data, list) else []
    names = [str(model["id"]) for model in models if isinstance(model, dict) and "id" in model]
    if not names:
        hint = "wait until it is ready" if status == 503 else "change --url"
        said = f"HTTP {status}: {_message(content)}"
        raise PreflightError(f"{address} lists no models ({said}); {hint}")
    return names


def _message(content: bytes) -> str:
    """What an error's body says, in OpenAI's shape or not."""
    text = content.decode(errors="replace")
    values = _loads(content)
    error = values.get("error") if isinstance(values, dict) else None
    said = error.get("message") if isinstance(error, dict) else error
    return " ".join(str(said or text).split())[:_DETAIL_LENGTH]


def _loads(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def _kind(error: aiohttp.ClientError | TimeoutError) -> str:
    if isinstance(error, TimeoutError):
        return "timeout"
    is_refused = isinstance(error, aiohttp.ClientConnectorError)
    return "connection refused" if is_refused else "connection lost"


def _reason(error: Exception) -> str:
    """Why there is no connection, in the system's words."""
    if not isinstance(error, aiohttp.ClientConnectorError):
        return str(error) or type(error).__name__
    number = error.os_error.errno or 0
    return os.strerror(number) if number > 0 else str(error.os_error.strerror or error.os_error)
