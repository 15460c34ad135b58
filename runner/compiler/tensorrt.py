"""The tensorrt backend: one engine a segment, built by Torch-TensorRT.

The only file that imports `torch_tensorrt`, and late: its import takes seconds and raises where
there is no driver. Not here: running an engine (`tensorrt_runtime`), which needs TensorRT alone.
"""

import logging
import os
import pwd
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from types import ModuleType

import torch

from parallel.errors import PreflightError, UnsupportedSegmentError
from runner.compiler.backend import Compiled
from runner.compiler.counter import counted
from runner.compiler.host import target_of
from runner.compiler.segment import Segment
from runner.compiler.tensorrt_complaints import Complaints, explain, quiet, shorten
from runner.compiler.tensorrt_forms import FORMS, reform
from runner.compiler.tensorrt_install import Install, find_install
from runner.compiler.tensorrt_io import ENGINE_FILE, EngineIO, specs_of
from runner.compiler.tensorrt_runtime import EngineRuntime

KERNELS_FILE = "tensorrt.kernels"
"""Among a rank's caches: the kernels that RTX compiled for its engines."""


@dataclass(frozen=True)
class BuildSettings:
    """What TensorRT's builder is told; part of an artefact's key.

    Attributes:
        optimization_level: 0 builds fastest, 5 searches longest; None: TensorRT's own choice.
        workspace_bytes: most scratch memory for one layer, where the network can be built within
            that; 0: all there is.
    """

    optimization_level: int | None = None
    workspace_bytes: int = 2**30


class TensorRTBackend:
    """Implements `runner.compiler.backend.Backend` on one GPU.

    Attributes:
        runtime: holds what all loaded engines of this rank share.
    """

    name = "tensorrt"

    def __init__(
        self,
        device: torch.device,
        *,
        settings: BuildSettings | None = None,
        checks: bool = True,
    ) -> None:
        """
        Args:
            checks: whether Torch-TensorRT imports is tried in another process first, since it may
                end this one.
        """
        self._device = device
        self._settings = settings or BuildSettings()
        self._checks = checks
        self._imports = False
        self.runtime = EngineRuntime(device)

    def fingerprint(self) -> Mapping[str, str]:
        """See `Backend`."""
        if self._device.type != "cuda":
            raise PreflightError(
                f"compile.backend: tensorrt needs a GPU, and this rank runs on {self._device}; set "
                "compile.backend to inductor or eager"
            )
        return make_fingerprint(
            self._install,
            self._settings,
            target=target_of(self._device),
            gpu=torch.cuda.get_device_name(self._device),
        )

    def build(self, segment: Segment, program: torch.export.ExportedProgram, folder: Path) -> None:
        """See `Backend`."""
        self.prepare()
        with torch.cuda.device(self._device):
            write_artefact(
                program,
                folder,
                kind=segment.kind,
                settings=self._settings,
                install=self._install,
                target=target_of(self._device),
            )

    def prepare(self) -> None:
        """See `Preparing`."""
        if self._imports:
            return
        check_user()
        if self._checks:
            check_import()
        try:
            import_torch_tensorrt()
        except Exception as error:  # Whatever its initialization meets.
            raise _does_not_import(str(error)) from error
        self._imports = True

    def load(self, folder: Path, segment: Segment) -> Compiled:
        """See `Backend`."""
        return self.runtime.load(folder, segment)

    def read_caches(self, folder: Path) -> None:
        """See `Caching`."""
        file = folder / KERNELS_FILE
        if file.exists():
            self.runtime.read_kernels(file)

    def write_caches(self, folder: Path) -> None:
        """See `Caching`."""
        self.runtime.write_kernels(folder / KERNELS_FILE)

    @cached_property
    def _install(self) -> Install:
        return find_install()


def make_fingerprint(
    install: Install, settings: BuildSettings, *, target: str, gpu: str
) -> dict[str, str]:
    """All that an engine depends on beside its segment."""
    return {
        "flavour": install.flavour,
        "tensorrt": install.tensorrt,
        "torch_tensorrt": install.torch_tensorrt,
        "torch": str(torch.__version__),
        "target": target,
        "gpu": gpu,
        "forms": FORMS,
        **{name: str(value) for name, value in asdict(settings).items()},
    }


def write_artefact(
    program: torch.export.ExportedProgram,
    folder: Path,
    *,
    kind: str,
    settings: BuildSettings,
    install: Install,
    target: str,
) -> None:
    """Build an engine for the current GPU, and write the files of its artefact.

    Args:
        kind: the segment's, for messages.

    Raises:
        UnsupportedSegmentError: see `build_engine`.
    """
    takes, _ = specs_of(program)
    program = reform(program, install.flavour)
    engine = build_engine(program, kind=kind, settings=settings)
    inputs, outputs = specs_of(program)
    (folder / ENGINE_FILE).write_bytes(engine)
    io = EngineIO(install.flavour, install.tensorrt, target, tuple(takes.values()), inputs, outputs)
    io.write(folder)


def check_user() -> None:
    """Raises PreflightError: this user has no name, without which `torch_tensorrt` crashes."""
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        raise PreflightError(
            f"user id {os.getuid()} has no line in /etc/passwd, and Torch-TensorRT does not import "
            "without one; add the line, or run as a user that has one"
        ) from None


def check_import() -> None:
    """Find out in another process whether `torch_tensorrt` imports on this host.

    Raises:
        PreflightError: it does not; says why.
    """
    command = [sys.executable, "-c", "import torch_tensorrt"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise _does_not_import((done.stderr.strip().splitlines() or ["no message"])[-1])


def _does_not_import(reason: str) -> PreflightError:
    return PreflightError(
        f"torch_tensorrt does not import on this host ({reason}); it needs an NVIDIA driver and "
        "the torch that it was made for: see shardline doctor, or set compile.backend to inductor"
    )


def build_engine(
    program: torch.export.ExportedProgram, *, kind: str, settings: BuildSettings
) -> bytes:
    """The whole program as one serialized engine for the current GPU, or an error.

    The network is strongly typed: every tensor keeps the dtype that it has in the program. Inputs
    are only described, so weights take no memory.

    Args:
        kind: the segment's, for messages.

    Raises:
        UnsupportedSegmentError: an operator has no converter, or TensorRT refuses the network.
    """
    fault = _fault_of_outputs(program)
    if fault:
        raise _unsupported(kind, fault)
    try:
        return _build_within(program, kind, settings)
    except _WorkspaceError:
        return _build_within(program, kind, replace(settings, workspace_bytes=0))


class _WorkspaceError(UnsupportedSegmentError):
    """TensorRT finds no kernel that needs as little scratch memory as it may take."""


def _build_within(
    program: torch.export.ExportedProgram, kind: str, settings: BuildSettings
) -> bytes:
    with counted("tensorrt"), quiet() as said:
        torch_tensorrt = import_torch_tensorrt()
        try:
            engine = _convert(torch_tensorrt, program, settings)
        except Exception as error:
            raise _refusal(kind, explain(error, said), said, settings) from error
    # A network that TensorRT complained of can still come out as an engine: of something else.
    if said.errors:
        reason = f"TensorRT refused its network ({shorten(said.errors[0])})"
        raise _refusal(kind, reason, said, settings)
    return engine


def _refusal(
    kind: str, reason: str, said: Complaints, settings: BuildSettings
) -> UnsupportedSegmentError:
    error = _unsupported(kind, reason)
    is_tight = settings.workspace_bytes and said.lacks_workspace
    return _WorkspaceError(str(error)) if is_tight else error


def _fault_of_outputs(program: torch.export.ExportedProgram) -> str | None:
    """Torch-TensorRT would leave such an output out, without an error."""
    outputs = program.graph_signature.user_outputs
    if len(set(outputs)) < len(outputs):
        return "it returns one tensor twice"
    if set(outputs) & set(program.graph_signature.user_inputs):
        return "it returns an input as it is"
    return None


def _convert(
    torch_tensorrt: ModuleType, program: torch.export.ExportedProgram, settings: BuildSettings
) -> bytes:
    inputs, _ = specs_of(program)
    engine: bytes = torch_tensorrt.dynamo.convert_exported_program_to_serialized_trt_engine(
        program,
        arg_inputs=[torch_tensorrt.Input(shape=s.shape, dtype=s.dtype) for s in inputs.values()],
        disable_tf32=True,
        optimization_level=settings.optimization_level,
        workspace_size=settings.workspace_bytes,
        immutable_weights=True,
        # Its cache takes different graphs for equal; ours is the artefact's key.
        cache_built_engines=False,
        reuse_cached_engines=False,
    )
    return engine


def import_torch_tensorrt() -> ModuleType:
    """`torch_tensorrt`, without its hook on Python's warnings and without what it says of packages
    that nobody asked for.
    """
    with quiet():
        import torch_tensorrt

        logging.captureWarnings(False)
    module: ModuleType = torch_tensorrt
    return module


def _unsupported(kind: str, reason: str) -> UnsupportedSegmentError:
    return UnsupportedSegmentError(
        f"segment {kind!r} cannot be compiled by the tensorrt backend: {reason}; set "
        "compile.backend to inductor or auto"
    )
