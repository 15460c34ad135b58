"""The client against a server that sends what a test wrote down, byte by byte."""

import asyncio
import json
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import pytest

from runner.bench.load.client import Client
from runner.bench.load.timeline import Timeline

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
DONE = b"data: [DONE]\n\n"
END = b"0\r\n\r\n"


def event(**values: Any) -> bytes:
    return f"data: {json.dumps(values)}\n\n".encode()


def text(piece: str) -> bytes:
    return event(choices=[{"text": piece}])


def chunked(parts: Sequence[bytes]) -> list[bytes]:
    return [b"%x\r\n%s\r\n" % (len(part), part) for part in parts]


def ask(*parts: bytes, timeout_s: float = 10.0, stays_open: bool = False) -> Timeline:
    """Send one request; the parts are the answer, each a while after the one before."""
    asked: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readuntil(b'"extra":1}'))
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0.02)
        if stays_open:
            await asyncio.sleep(5)
        writer.close()

    async def run() -> Timeline:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1/"
        given: dict[str, Any] = {"model": "m", "key": "k", "extra": {"extra": 1}}
        async with Client(url, timeout_s=timeout_s, **given) as client:
            return await client.send({"prompt": [1, 2], "max_tokens": 4}, due_at=0.0)

    timeline = asyncio.run(run())
    head, _, body = asked[0].partition(b"\r\n\r\n")
    assert head.startswith(b"POST /v1/completions ")
    assert b"Authorization: Bearer k" in head
    sent = json.loads(body)
    assert sent["stream_options"] == {"include_usage": True}
    assert (sent["model"], sent["prompt"], sent["max_tokens"]) == ("m", [1, 2], 4)
    return timeline


def test_chunks_with_text_are_timed_and_usage_is_what_counts() -> None:
    usage = event(choices=[], usage={"prompt_tokens": 2, "completion_tokens": 4})
    timeline = ask(HEAD, *chunked([text(""), text("ab"), text("cd"), usage, DONE]), END)
    assert timeline.error is None
    assert (timeline.prompt_tokens, timeline.num_output_tokens) == (2, 4)
    assert len(timeline.chunks_at) == 2
    # The chunk without text came first, and is not the first token.
    assert timeline.ttft_s >= 0.03
    assert timeline.itls_s[0] > 0.005
    assert timeline.ended_at >= timeline.chunks_at[-1]


def test_an_answer_without_text_ends_when_it_ends() -> None:
    timeline = ask(HEAD, *chunked([text(""), DONE]), END)
    assert timeline.error is None
    assert timeline.chunks_at == [timeline.ended_at]


def test_an_event_may_be_long_and_come_in_parts() -> None:
    long = text("a" * 3 * 2**20)
    timeline = ask(HEAD, *chunked([long[:100], long[100:], DONE.rstrip()]), END)
    assert timeline.error is None
    assert len(timeline.chunks_at) == 1


@pytest.mark.parametrize(
    ("parts", "kind", "detail"),
    [
        ([HEAD, *chunked([text("a")]), END], "incomplete stream", ""),
        (
            [HEAD, *chunked([text("a"), event(error={"message": "rank 1"})]), END],
            "error in stream",
            "rank 1",
        ),
        ([HEAD, *chunked([b"data: {broken\n\n"]), END], "error in stream", "broken"),
        ([HEAD, *chunked([text("a")])], "connection lost", ""),
        ([], "connection lost", ""),
        (
            [b"HTTP/1.1 429 Busy\r\nContent-Length: 30\r\n\r\n", b'{"error": {"message": "full"}}'],
            "HTTP 429",
            "full",
        ),
        ([b"HTTP/1.1 502 Bad\r\nContent-Length: 5\r\n\r\nproxy"], "HTTP 502", "proxy"),
    ],
)
def test_errors_by_kind(parts: list[bytes], kind: str, detail: str) -> None:
    timeline = ask(*parts)
    assert timeline.error == kind
    assert detail in timeline.detail


def test_requests_one_after_the_other_share_a_connection() -> None:
    """What another one takes to be made would be counted as the server's."""
    connections = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        with suppress(asyncio.IncompleteReadError):
            while await reader.readuntil(b'"extra":1}'):
                for part in (HEAD, *chunked([text("a"), DONE]), END):
                    writer.write(part)
                    await asyncio.sleep(0.005)
        writer.close()

    async def run() -> list[Timeline]:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with Client(url, model="m", key=None, timeout_s=10, extra={"extra": 1}) as client:
            return [await client.send({"prompt": [1]}, due_at=0.0) for _ in range(5)]

    assert {timeline.error for timeline in asyncio.run(run())} == {None}
    assert connections == 1


def test_a_silent_server_is_a_timeout() -> None:
    timeline = ask(HEAD, timeout_s=0.2, stays_open=True)
    assert timeline.error == "timeout"
    assert timeline.ended_at - timeline.sent_at < 4
