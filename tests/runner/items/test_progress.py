"""A bar on a terminal, lines of JSON elsewhere, and not too many of them."""

import io
import json
import os
import pty
import time
from contextlib import suppress

import pytest

from runner.items.progress import ItemProgress


def lines(stream: io.StringIO) -> list[dict[str, float]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_where_no_one_watches_it_tells_seldom_and_at_the_end() -> None:
    stream = io.StringIO()
    with ItemProgress(110, 10, stream=stream) as progress:
        for index in range(100):
            progress.advance(failed=index % 10 == 0)
    (line,) = lines(stream)
    assert (line["done"], line["total"], line["failed"]) == (110, 110, 10)
    assert (line["percent"], line["remaining_s"]) == (100, 0)


def test_the_rate_is_that_of_this_run() -> None:
    stream = io.StringIO()
    with ItemProgress(1020, 1000, stream=stream, interval_s=0) as progress:
        for _ in range(10):
            time.sleep(0.01)
            progress.advance()
    told = lines(stream)
    assert [line["done"] for line in told] == list(range(1001, 1011))
    assert 1 < told[-1]["items_per_s"] <= 100
    assert 0.1 <= told[-1]["remaining_s"] < 10


def test_a_run_with_nothing_to_do_tells_once() -> None:
    stream = io.StringIO()
    with ItemProgress(5, 5, stream=stream):
        pass
    (line,) = lines(stream)
    assert (line["done"], line["items_per_s"], line["remaining_s"]) == (5, 0, None)


def read_to_end(terminal: int) -> str:
    """What was written to a terminal that is closed; it may come in several parts."""
    shown = b""
    with os.fdopen(terminal, "rb", buffering=0) as stream, suppress(OSError):
        while part := stream.read(100_000):
            shown += part
    return shown.decode()


def test_a_terminal_has_a_bar() -> None:
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as stream, ItemProgress(40, 30, stream=stream) as progress:
        for index in range(10):
            progress.advance(failed=index == 3)
    shown = read_to_end(ours)
    assert "40/40" in shown
    assert "1 failed" in shown
    assert "items/s" in shown
    assert "{" not in shown


def test_tokens_are_told_where_they_are_counted() -> None:
    """Also while no request is complete."""
    stream = io.StringIO()
    with ItemProgress(2, noun="requests", stream=stream, interval_s=0) as progress:
        time.sleep(0.01)
        progress.count_tokens(3)
        progress.count_tokens(4)
        progress.advance()
    first, second, third = lines(stream)
    assert (first["event"], first["done"], first["requests_per_s"]) == ("requests", 0, 0)
    assert first["remaining_s"] is None
    assert 0 < first["tokens_per_s"] < second["tokens_per_s"] * 2
    assert third["done"] == 1
    assert third["tokens_per_s"] / third["requests_per_s"] == pytest.approx(7, rel=0.02)
