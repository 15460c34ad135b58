"""Build a rank's segments anew, where a bundle holds them for another host. Not here: the choice of
the backends, which stays that of the bundle.
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from runner.compiler.backend import artefact_key
from runner.compiler.backends import Backends
from runner.models.decoder import DecoderStage

Artefact = tuple[str, str]
"""The name of a backend and the key of what it made."""


def build_artefacts(
    uses: Mapping[str, Mapping[int, Artefact]],
    stage: DecoderStage,
    backends: Backends,
    device: torch.device,
    folder: Path,
) -> dict[str, dict[int, Artefact]]:
    """Build what runs each kind of part at each number of rows, into folders named by the keys.

    Args:
        uses: kind -> number of rows -> artefact of the other host.

    Returns:
        The same with the keys of what was built.

    Raises:
        PreflightError: a backend is not usable on this host.
        UnsupportedSegmentError: a backend cannot compile a segment here.
    """
    built: dict[str, dict[int, Artefact]] = {}
    parts = stage.parts_by_kind()
    for kind, by_rows in uses.items():
        for num_rows, (backend, _) in by_rows.items():
            segment = parts[kind].segment(num_rows)
            program = segment.export(device)
            key = artefact_key(segment.digest(program), backends[backend])
            if not (folder / key).exists():
                (folder / key).mkdir()
                backends[backend].build(segment, program, folder / key)
            built.setdefault(kind, {})[num_rows] = (backend, key)
    return built
