"""Requests that no client should send: bodies as JSON has them not, and bytes that are no HTTP."""

import json
import random
import socket
from collections.abc import Iterator

_BODY = {"prompt": "x", "max_tokens": 1, "stop": ["a"], "temperature": 0.5, "seed": 1}
_CHAT = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
_VALUES = [
    *("null", "true", "-1", "0", "1e999", "-1e999", "NaN", "Infinity", "1" * 5000, "1e-400"),
    *('""', '"\\ud800"', '"\\u0000"', '"\udcff"', '"' + "x" * 5000 + '"', "[]", "{}", "[[]]"),
    *("[" * 3000, '{"a":' * 3000, '{"role": "user", "content": null}', "[null]", '[{"type": 1}]'),
]
_TENSOR_VALUES = [
    *("[1, 4]", "[-1, 4]", "[1, -4]", "[0, 4]", "[1, 99999999999]", "[4]", "[1, 4, 1]", "[1.5, 4]"),
    *('"FP32"', '"FP64"', '"BYTES"', '"INT4"', '"x"', "16", "15", "17", "10000000000"),
]
_RAW = "to be replaced"
_HEADS = [
    "Content-Length: {less}",
    "Content-Length: {more}",
    "Content-Length: -1",
    "Content-Length: 99999999999999999999",
    "Content-Length: {right}\r\nContent-Length: {more}",
    "Content-Length: {right}\r\nTransfer-Encoding: chunked",
    "Transfer-Encoding: chunked",
    "Transfer-Encoding: chunked, gzip",
    "Content-Encoding: gzip\r\nContent-Length: {right}",
    "Content-Type: text/plain; charset=utf-16\r\nContent-Length: {right}",
    "Content-Type: multipart/form-data\r\nContent-Length: {right}",
    "X: \0\r\nContent-Length: {right}",
    "Authorization: Bearer \xff\r\nContent-Length: {right}",
    "Expect: 100-continue\r\nContent-Length: {right}",
    "Connection: upgrade\r\nUpgrade: websocket\r\nContent-Length: {right}",
]
_PATHS = [
    *("/v1/completions", "/v1/chat/completions", "/v1/models/%00", "/v1/models/%ff%fe"),
    *("/health/ready", "/metrics", "/openapi.json", "//", "/v1/../../etc/passwd", "/\xff", "*"),
]


def malformed(number: int, *, seed: int = 0) -> Iterator[bytes]:
    """So many requests as bytes; the same for the same seed."""
    chance = random.Random(seed)
    for _ in range(number):
        path = chance.choice(_PATHS[:2] * 10 + _PATHS)
        body = _spoiled(chance, _CHAT if "chat" in path else _BODY)
        yield _head(chance, path, body) + body


def malformed_tensors(path: str, number: int, *, seed: int = 0) -> Iterator[bytes]:
    """So many requests of the Open Inference Protocol's binary extension, whose sizes lie."""
    chance = random.Random(seed)
    for _ in range(number):
        given = {"name": "x", "shape": [1, 4], "datatype": "FP32"}
        parameters = {"binary_data_size": 16}
        spoiled = chance.choice([given, given, parameters])
        spoiled[chance.choice([*spoiled, "unknown"])] = _RAW
        head = json.dumps({"inputs": [given | {"parameters": parameters}]})
        head = head.replace(json.dumps(_RAW), chance.choice(_VALUES + _TENSOR_VALUES))
        raw = head.encode(errors="surrogateescape")
        body = raw + chance.randbytes(chance.choice([0, 15, 16, 16, 17]))
        told = chance.choice([len(raw)] * 6 + [0, -1, len(raw) - 1, len(raw) + 1, 10**30, "x"])
        yield (
            f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
            f"Inference-Header-Content-Length: {told}\r\n\r\n"
        ).encode() + body


def status_of(address: tuple[str, int], request: bytes, *, is_whole: bool = False) -> int | None:
    """The status of the answer; None: the server cut the connection without one.

    Args:
        is_whole: the request has the length that it says, so that the server waits for no more. One
            that is told that no more will come may take it for a client that has left.
    """
    with socket.create_connection(address, timeout=30) as connection:
        try:
            connection.sendall(request)
            if not is_whole:
                connection.shutdown(socket.SHUT_WR)
            line = connection.makefile("rb").readline()
        except (BrokenPipeError, ConnectionResetError):
            return None
    return int(line.split()[1]) if line else None


def _spoiled(chance: random.Random, good: dict[str, object]) -> bytes:
    """A body with a value that cannot be, or with damaged bytes, or both."""
    values = {key: json.dumps(value) for key, value in good.items()}
    values[chance.choice([*values, "unknown", "\\ud800", ""])] = chance.choice(_VALUES)
    text = "{" + ", ".join(f'"{key}": {value}' for key, value in values.items()) + "}"
    body = bytearray(text.encode(errors="surrogateescape"))
    for _ in range(chance.choice([0, 0, 1, 3])):
        body[chance.randrange(len(body))] = chance.randrange(256)
    if chance.random() < 0.2:
        del body[chance.randrange(len(body)) :]
    return bytes(body)


def _head(chance: random.Random, path: str, body: bytes) -> bytes:
    method = chance.choice(["POST"] * 8 + ["GET", "PUT", "\0", "A" * 1000])
    version = chance.choice(["HTTP/1.1"] * 8 + ["HTTP/1.0", "HTTP/9.9", ""])
    lengths = {"right": len(body), "less": len(body) // 2, "more": len(body) + 100}
    head = chance.choice(["Content-Length: {right}"] * 10 + _HEADS).format(**lengths)
    return f"{method} {path} {version}\r\nHost: x\r\n{head}\r\n\r\n".encode("latin-1")
