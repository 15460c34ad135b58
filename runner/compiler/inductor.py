"""The `inductor` backend: AOTInductor makes a shared library of a segment; loading it compiles
nothing.

On a GPU the kernels lie inside the library. A library is native code: its hash is checked by
whoever opens the bundle, before `load`.
"""

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from parallel.errors import IncompatibleError, PreflightError, UnsupportedSegmentError
from runner.compiler.backend import Compiled
from runner.compiler.counter import counted
from runner.compiler.host import cpu_isa, gpu_name
from runner.compiler.segment import Segment

LIBRARY = "segment.so"

_TUNED_ROWS = 64
"""Up to so many rows a matrix product waits for memory, and a tuned kernel beats the library's."""


class InductorBackend:
    """Builds for the device at hand, CPU or GPU."""

    name = "inductor"

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def fingerprint(self) -> Mapping[str, str]:
        check_compiler()
        hardware = gpu_name(self._device) if self._device.type == "cuda" else cpu_isa()
        return {"torch": torch.__version__, "hardware": hardware}

    def build(self, segment: Segment, program: torch.export.ExportedProgram, folder: Path) -> None:
        with tempfile.TemporaryDirectory() as work, counted("inductor"):
            made = Path(work, LIBRARY)
            try:
                inputs, _ = program.example_inputs
                torch._inductor.aot_compile(
                    program.module(), inputs, options=self._options(segment, made)
                )
            except Exception as error:
                raise UnsupportedSegmentError(
                    f"inductor cannot compile segment {segment.kind} "
                    f"({type(error).__name__}: {error}); use compile.backend: eager or auto"
                ) from error
            shutil.copyfile(made, folder / LIBRARY)

    def load(self, folder: Path, segment: Segment) -> Compiled:
        library = str(folder / LIBRARY)
        runners: Any = torch._C._aoti
        try:
            if self._device.type == "cuda":
                runner = runners.AOTIModelContainerRunnerCuda(library, 1, str(self._device), "")
            else:
                runner = runners.AOTIModelContainerRunnerCpu(library, 1)
        except RuntimeError as error:
            raise IncompatibleError(
                f"{library}: the library of segment {segment.kind} does not load ({error}); "
                "run shardline compile on this host"
            ) from None

        def run(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple(runner.run(inputs))

        return run

    def _options(self, segment: Segment, library: Path) -> dict[str, Any]:
        options: dict[str, Any] = {"aot_inductor.output_path": str(library)}
        if self._device.type == "cuda":
            options["aot_inductor.embed_kernel_binary"] = True
            if segment.activations[0].shape[0] <= _TUNED_ROWS:
                options |= {"max_autotune": True, "coordinate_descent_tuning": True}
        return options


def check_compiler() -> None:
    """Raises PreflightError: there is no C++ compiler."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise PreflightError(
            f"backend inductor needs a C++ compiler, {compiler} is not on PATH; install g++, set "
            "CXX, or use compile.backend: eager"
        )
