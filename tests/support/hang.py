"""Ranks of the command that hang in their loops when a test says so."""

from collections.abc import Callable
from pathlib import Path

import pytest


def may_hang(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Of commands that start from here on; call what is returned with the rank.

    Only the loop hangs (`hanging.sitecustomize`); the rank's other threads live on.

    Args:
        folder: of the test.
    """
    file = folder / "hang"
    monkeypatch.setenv("SHARDLINE_TEST_HANG", str(file))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent / "hanging"))
    return lambda rank: file.with_name(f"hang{rank}").touch()
