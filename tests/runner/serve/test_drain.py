"""The end of a server that was told to end."""

import os
import signal
import sys

import pytest

from runner.serve.lifecycle import State
from runner.serve.rank import _Drain


class Front:
    state: State = "ready"

    def __init__(self) -> None:
        self.drained: list[float] = []

    def drain(self, timeout_s: float) -> None:
        self.drained.append(timeout_s)

    def fail(self, message: str) -> None:
        raise AssertionError(message)


def test_it_drains_even_where_nobody_reads_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    front = Front()
    with open(writer, "w") as unread:
        monkeypatch.setattr(sys, "stderr", unread)
        _Drain(front, 5.0, ends_early=True).begin(signal.SIGTERM)
    assert front.drained == [5.0]
