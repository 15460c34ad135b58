"""Artefacts of older bundles: one whose key is wanted again is taken over, not built again.

A key names all that an artefact depends on, so the old plan and weights do not matter.
"""

import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from parallel.errors import IncompatibleError, IntegrityError
from runner.bundle.files import find_faults
from runner.bundle.layout import artefact_folder
from runner.bundle.manifest import Manifest

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class OldArtefact:
    """Files, relative to `folder`, whose hashes are right."""

    folder: Path
    names: tuple[str, ...]


class OldArtefacts:
    """What some bundles hold; one that cannot be read is left out, with a line in the log."""

    def __init__(self, bundles: Sequence[Path]) -> None:
        self._manifests: dict[Path, Manifest] = {}
        for bundle in bundles:
            try:
                self._manifests[bundle] = Manifest.read(bundle)
            except (IntegrityError, IncompatibleError) as error:
                _LOG.warning("nothing is taken over from %s: %s", bundle, error)

    def find(self, key: str) -> OldArtefact | None:
        """The artefact of that key, in the first bundle where it is whole."""
        below = artefact_folder(key)
        for bundle, manifest in self._manifests.items():
            if key not in manifest.artefacts:
                continue
            files = manifest.files_below(below)
            faults = find_faults(bundle, files)
            if not faults:
                names = tuple(str(PurePosixPath(name).relative_to(below)) for name in files)
                return OldArtefact(bundle / below, names)
            _LOG.warning("artefact %s is not taken over from %s: %s", key, bundle, faults[0])
        return None

    def link(self, old: OldArtefact, folder: Path) -> None:
        """Let the files be in `folder`, too: as hard links, or copied to another disk."""
        for name in old.names:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(old.folder / name, target)
            except OSError:
                shutil.copyfile(old.folder / name, target)
