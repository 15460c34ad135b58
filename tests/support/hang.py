"""Ranks of the command that hang in their loops, or raise there, when a test says so."""

from pathlib import Path
from typing import Literal, Protocol

import pytest


class Spoil(Protocol):
    def __call__(
        self, rank: int, how: Literal["hang", "hang in take", "raise"] = "hang"
    ) -> None: ...


def may_hang(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Spoil:
    """Of commands that start from here on; call what is returned with the rank.

    Only the loop is spoiled (`hanging.sitecustomize`); the rank's other threads live on.

    Args:
        folder: of the test.
    """
    file = folder / "hang"
    monkeypatch.setenv("SHARDLINE_TEST_HANG", str(file))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent / "hanging"))

    def spoil(rank: int, how: str = "hang") -> None:
        file.write_text(how)
        file.rename(file.with_name(f"hang{rank}"))

    return spoil
