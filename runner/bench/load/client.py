"""A client of one server of OpenAI's API: it sends a request as a stream and notes when what came.

It talks to the URL that it is given, and to no proxy.
"""

import json
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

import httpx

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
        self._http = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=timeout_s,
            limits=httpx.Limits(max_connections=None),
            trust_env=False,
        )

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self._http.aclose()

    async def check(self) -> None:
        """See that the server is there, takes the key, and has the model.

        Raises:
            ConfigError: the URL, the key or the model is wrong.
            PreflightError: nobody answers, or something that is not such a server.
        """
        address = f"{self.url}/v1/models"
        try:
            answer = await self._http.get(address)
        except (httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
            raise ConfigError(f"--url {self.url}: {error}") from None
        except httpx.HTTPError as error:
            raise PreflightError(
                f"no server answers at {self.url} ({_reason(error)}); start one, or change --url"
            ) from None
        if answer.status_code in (401, 403):
            raise ConfigError(
                f"{self.url} refuses the key (HTTP {answer.status_code}); give the right one by "
                "--key-file"
            )
        names = _names(answer)
        if self.model and self.model not in names:
            raise ConfigError(f"--model {self.model}: the server has {', '.join(names)}")
        self.model = self.model or names[0]

    async def send(self, body: Body, *, due_at: float) -> Timeline:
        """One request to its end; an error is a part of what is returned."""
        timeline = Timeline(due_at, time.perf_counter())
        try:
            await self._stream(body, timeline)
        except httpx.HTTPError as error:
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
        async with self._http.stream("POST", f"{self.url}/v1/{route}", json=sent) as answer:
            if answer.status_code != 200:
                timeline.error = f"HTTP {answer.status_code}"
                timeline.detail = _message(await answer.aread())
                return
            timeline.error = "incomplete stream"
            async for event in _events(answer):
                if event is None:
                    timeline.error = None
                    return
                if "error" in event:
                    timeline.error = "error in stream"
                    timeline.detail = str(event["error"])[:_DETAIL_LENGTH]
                    return
                _note(event, timeline)


async def _events(answer: httpx.Response) -> AsyncIterator[dict[str, Any] | None]:
    """The JSON of each event; None at the end of a complete stream."""
    async for line in answer.aiter_lines():
        if not line.startswith("data:"):
            continue
        data = line.removeprefix("data:").strip()
        event = None if data == "[DONE]" else _loads(data)
        yield event if isinstance(event, dict) or data == "[DONE]" else {"error": data}


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


def _names(answer: httpx.Response) -> list[str]:
    """Raises PreflightError: it is not ready, or no server of this kind."""
    listing = _loads(answer.text)
    data = listing.get("data") if isinstance(listing, dict) else None
    models = data if answer.status_code == 200 and isinstance(data, list) else []
    names = [str(model["id"]) for model in models if isinstance(model, dict) and "id" in model]
    if not names:
        hint = "wait until it is ready" if answer.status_code == 503 else "change --url"
        said = f"HTTP {answer.status_code}: {_message(answer.content)}"
        raise PreflightError(f"{answer.url} lists no models ({said}); {hint}")
    return names


def _message(content: bytes) -> str:
    """What an error's body says, in OpenAI's shape or not."""
    text = content.decode(errors="replace")
    values = _loads(text)
    error = values.get("error") if isinstance(values, dict) else None
    said = error.get("message") if isinstance(error, dict) else error
    return " ".join(str(said or text).split())[:_DETAIL_LENGTH]


def _loads(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _kind(error: httpx.HTTPError) -> str:
    if isinstance(error, httpx.TimeoutException):
        return "timeout"
    return "connection refused" if isinstance(error, httpx.ConnectError) else "connection lost"


def _reason(error: httpx.HTTPError) -> str:
    return str(error) or type(error).__name__
