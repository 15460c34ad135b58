"""`bench serve` where its extra is not installed."""

import sys

import pytest
from typer.testing import CliRunner

from parallel.errors import PreflightError
from runner.cli.app import app


def test_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("runner.bench.load")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    done = CliRunner().invoke(app, ["bench", "serve", "--concurrency", "2"])
    assert isinstance(done.exception, PreflightError)
    assert "bench serve needs aiohttp; install the extra" in str(done.exception)
