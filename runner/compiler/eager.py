"""The `eager` backend: a segment runs as it is, by PyTorch's kernels. Its artefacts are empty."""

from collections.abc import Mapping
from pathlib import Path

import torch

from runner.compiler.backend import Compiled
from runner.compiler.segment import Segment


class EagerBackend:
    """Compiles nothing; the baseline of every comparison."""

    name = "eager"

    def fingerprint(self) -> Mapping[str, str]:
        return {"torch": torch.__version__}

    def build(self, segment: Segment, program: torch.export.ExportedProgram, folder: Path) -> None:
        """There is nothing to write."""

    def load(self, folder: Path, segment: Segment) -> Compiled:
        """The module itself, called with weights from outside."""
        del folder
        return segment.function()
