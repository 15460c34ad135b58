"""`Backend`: how segments become artefacts, and artefacts callables.

One file a backend: `eager`, `inductor`, `tensorrt`. An artefact is a folder of files whose name is
its key; what else it is, only its backend knows.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch

from runner.compiler.segment import Segment

Compiled = Callable[..., tuple[torch.Tensor, ...]]
"""A segment at work: activations and weights in, one after the other; outputs out, all of them
contiguous and on the device that it was loaded for.
"""


class Backend(Protocol):
    """Builds and loads artefacts."""

    @property
    def name(self) -> str:
        """What the configuration calls it."""
        ...

    def fingerprint(self) -> Mapping[str, str]:
        """All that an artefact depends on beside the segment: settings, versions, hardware.

        Raises:
            PreflightError: the backend is not usable on this host; names what is missing.
        """
        ...

    def build(self, segment: Segment, program: torch.export.ExportedProgram, folder: Path) -> None:
        """Write the files of an artefact into an empty folder.

        Raises:
            UnsupportedSegmentError: an operator cannot be compiled; names it and the remedy.
        """
        ...

    def load(self, folder: Path, segment: Segment) -> Compiled:
        """Read an artefact that `build` wrote, on this rank's device. Compiles nothing.

        Raises:
            IncompatibleError: the file is whole, but not for this host.
        """
        ...


@runtime_checkable
class Checking(Protocol):
    """A backend whose artefacts can turn out to be of no use on the host that made them."""

    def check(self, folder: Path) -> None:
        """Try an artefact in a process of its own. One is enough; later ones are not tried.

        Raises:
            PreflightError: it does not load, nor would others; every later `build` raises it, too.
        """
        ...


@runtime_checkable
class Preparing(Protocol):
    """A backend that takes seconds to import what it builds with."""

    def prepare(self) -> None:
        """Import it, in a process that will build; else the first `build` does.

        Raises:
            PreflightError: it does not import on this host; every later `build` raises it, too.
        """
        ...


@runtime_checkable
class Caching(Protocol):
    """A backend that completes its artefacts when they are loaded, and can keep what it made."""

    def read_caches(self, folder: Path) -> None:
        """Take over what `write_caches` wrote, before the first `load`.

        What does not fit to this host changes nothing but the time that loading takes.
        """
        ...

    def write_caches(self, folder: Path) -> None:
        """Keep what loading has made so far, in a file of the backend's own name, if anything."""
        ...


def artefact_key(digest: str, backend: Backend) -> str:
    """sha256 of a segment's digest and of the backend's fingerprint; not of plan or weights."""
    parts = {"segment": digest, "backend": backend.name, **backend.fingerprint()}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
