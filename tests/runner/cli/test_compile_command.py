"""`compile` before any work."""

from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import NoReturn

import pytest
from typer.testing import CliRunner

from parallel.errors import PreflightError
from runner.bundle import host
from runner.cli.app import app


def test_a_tree_of_no_known_version_is_told_before_any_work(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> NoReturn:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(host.metadata, "version", absent)
    given = ["--model", str(checkpoint("llama")), "--device", "cpu"]
    done = CliRunner().invoke(app, ["compile", *given, "--output", str(tmp_path / "bundle")])
    assert isinstance(done.exception, PreflightError)
    assert "run `pip install .`" in str(done.exception)
    assert not list(tmp_path.iterdir())
