"""The inductor backend beside a compiler that does not do its work."""

from pathlib import Path

import pytest
import torch
from torch import nn

from parallel.errors import PreflightError
from runner.compiler.inductor import InductorBackend
from runner.compiler.segment import Segment, TensorSpec

# Links as told, and then spoils the library.
SPOILER = """#!/bin/sh
g++ "$@" || exit
while [ $# -gt 1 ]; do
  case "$1 $2" in "-o "*.so) echo nonsense > "$2" ;; esac
  shift
done
"""


@pytest.mark.full
def test_libraries_that_do_not_load_are_found_before_they_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoiler = tmp_path / "spoiler"
    spoiler.write_text(SPOILER)
    spoiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(spoiler))
    segment = Segment("linear", nn.Linear(8, 4), (TensorSpec((1, 8), torch.float32),))
    backend = InductorBackend(torch.device("cpu"))
    folder = tmp_path / "artefact"
    folder.mkdir()
    for _ in range(2):
        with pytest.raises(PreflightError, match="spoiler makes here do not load"):
            backend.build(segment, segment.export("cpu"), folder)
    assert list(folder.iterdir()) == []
