"""Engines for a GPU that this host need not have, such as "sm89".

Only TensorRT-RTX builds without a device, and Torch-TensorRT has to be made to believe in one, so
it is done in a process of its own: `target_builder`.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch

from parallel.errors import ConfigError, IncompatibleError, PreflightError, UnsupportedSegmentError
from runner.compiler.backend import Compiled
from runner.compiler.counter import counted
from runner.compiler.segment import Segment, save_program
from runner.compiler.tensorrt import BuildSettings, make_fingerprint
from runner.compiler.tensorrt_install import Install, describe_targets, find_install

ORDER_FILE = "order.json"

_ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class BuildJob:
    """One artefact to be built.

    Attributes:
        kind: the segment's, for messages.
        folder: an empty folder that receives the artefact.
    """

    kind: str
    program: torch.export.ExportedProgram
    folder: Path


class TensorRTTargetBackend:
    """Implements `runner.compiler.backend.Backend` for a named GPU; loads nothing.

    Args:
        target: compute capability: "sm75", "sm80", "sm86", "sm89", "sm120"; what the installed
            TensorRT-RTX takes.
    """

    name = "tensorrt"

    def __init__(self, target: str, *, settings: BuildSettings | None = None) -> None:
        self._target = target
        self._settings = settings or BuildSettings()

    def fingerprint(self) -> Mapping[str, str]:
        """See `Backend`.

        Raises:
            ConfigError: engines for this target cannot be built without it.
        """
        _check_target(self._target, self._install)
        return make_fingerprint(
            self._install, self._settings, target=self._target, gpu=f"any {self._target}"
        )

    def build(self, segment: Segment, program: torch.export.ExportedProgram, folder: Path) -> None:
        """See `Backend`."""
        self.build_all([BuildJob(segment.kind, program, folder)])

    def build_all(
        self, jobs: Sequence[BuildJob], *, on_built: Callable[[BuildJob], None] | None = None
    ) -> None:
        """Build many artefacts in one process, which pays for the import of Torch-TensorRT once.

        Args:
            on_built: called with each job when its artefact is whole, while the next one is built.

        Raises:
            UnsupportedSegmentError: the first one that cannot be compiled; none after it is built.
            PreflightError: the builder does not start on this host.
        """
        _check_target(self._target, self._install)
        with closing(run_builder(jobs, self._target, self._settings)) as errors:
            for job, error in zip(jobs, errors, strict=True):
                if error is not None:
                    raise UnsupportedSegmentError(error)
                if on_built:
                    on_built(job)

    def load(self, folder: Path, segment: Segment) -> Compiled:
        """Raises IncompatibleError: always; there is no such GPU here."""
        raise IncompatibleError(
            f"the engine of segment {segment.kind!r} in {folder} is for {self._target} and runs "
            "on such a GPU only"
        )

    @cached_property
    def _install(self) -> Install:
        return find_install()


def run_builder(
    jobs: Sequence[BuildJob], target: str, settings: BuildSettings
) -> Generator[str | None]:
    """Build in a process of its own, which ends with this generator.

    Yields:
        For each job, once it is done: None, or the message of an `UnsupportedSegmentError`.

    Raises:
        PreflightError: the process failed as a whole.
    """
    with tempfile.TemporaryDirectory(prefix="shardline-build-") as name:
        desk = Path(name)
        for i, job in enumerate(jobs):
            save_program(job.program, desk / f"{i}.pt2")
        order = {
            "target": target,
            "settings": asdict(settings),
            "jobs": [{"kind": job.kind, "folder": str(job.folder.absolute())} for job in jobs],
        }
        (desk / ORDER_FILE).write_text(json.dumps(order), encoding="utf-8")
        with counted("tensorrt"):
            yield from _answers(desk)


def _answers(desk: Path) -> Generator[str | None]:
    paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    # A file, since nobody would empty a second pipe while the builder waits for it.
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said,
        subprocess.Popen(
            [sys.executable, "-m", "runner.compiler.target_builder", str(desk)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
        ) as process,
    ):
        assert process.stdout is not None, "it was asked for"
        try:
            yield from map(json.loads, process.stdout)
            process.wait()
        finally:
            process.kill()  # Or it would go on building for a caller that has given up.
        said.seek(0)
        complaints = said.read().strip().splitlines()
    if process.returncode:
        reason = (complaints or [f"exit code {process.returncode}"])[-1]
        raise PreflightError(f"the builder of TensorRT-RTX does not run on this host: {reason}")


def _check_target(target: str, install: Install) -> None:
    if install.flavour != "rtx":
        raise ConfigError(
            f"target {target} needs torch-tensorrt-rtx; the standard TensorRT that is installed "
            "builds only for the GPU at hand: leave the target out and compile on such a GPU"
        )
    targets = describe_targets()
    if target not in targets:
        raise ConfigError(
            f"target {target} is not one of {', '.join(targets)}, which TensorRT-RTX "
            f"{install.tensorrt} builds for without the GPU; compile on a host that has it"
        )
