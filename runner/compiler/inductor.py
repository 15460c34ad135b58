"""The `inductor` backend: AOTInductor makes a shared library of a segment; loading it compiles
nothing.

On a GPU the kernels lie inside the library. A library is native code: its hash is checked by
whoever opens the bundle, before `load`.
"""

import json
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

_ONE_ROW = {"coordinate_descent_tuning": True}
"""With one row inductor writes matrix products as tuned reductions, which read weights faster than
the library does. With more rows it leaves them to the library, and searching brings little for
many seconds a segment.
"""


class InductorBackend:
    """Builds for the device at hand, CPU or GPU."""

    name = "inductor"

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def fingerprint(self) -> Mapping[str, str]:
        check_compiler()
        hardware = gpu_name(self._device) if self._device.type == "cuda" else cpu_isa()
        options = json.dumps([self._options(rows) for rows in (1, 2)], sort_keys=True)
        return {"torch": torch.__version__, "hardware": hardware, "options": options}

    def build(self, segment: Segment, program: torch.export.ExportedProgram, folder: Path) -> None:
        with tempfile.TemporaryDirectory() as work, counted("inductor"):
            made = Path(work, LIBRARY)
            try:
                inputs, _ = program.example_inputs
                options = self._options(segment.activations[0].shape[0])
                options["aot_inductor.output_path"] = str(made)
                torch._inductor.aot_compile(program.module(), inputs, options=options)
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

    def _options(self, num_rows: int) -> dict[str, Any]:
        if self._device.type == "cpu":
            return {}
        return {"aot_inductor.embed_kernel_binary": True, **(_ONE_ROW if num_rows == 1 else {})}


def check_compiler() -> None:
    """Raises PreflightError: there is no C++ compiler."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise PreflightError(
            f"backend inductor needs a C++ compiler, {compiler} is not on PATH; install g++, set "
            "CXX, or use compile.backend: eager"
        )
