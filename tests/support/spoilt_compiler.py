"""A C++ compiler whose libraries cannot be loaded."""

from pathlib import Path

import pytest

# Links as told, and then spoils the library.
_SPOILER = """#!/bin/sh
g++ "$@" || exit
while [ $# -gt 1 ]; do
  case "$1 $2" in "-o "*.so) echo nonsense > "$2" ;; esac
  shift
done
"""


def use_spoiler(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write it, and let inductor call it where it is imported from now on."""
    file.write_text(_SPOILER)
    file.chmod(0o755)
    monkeypatch.setenv("CXX", str(file))
