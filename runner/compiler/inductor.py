"""The `inductor` backend: AOTInductor makes a shared library of a segment; loading it compiles
nothing.

On a GPU the kernels lie inside the library. A library is native code: its hash is checked by
whoever opens the bundle, before `load`.
"""

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from parallel.errors import IncompatibleError, PreflightError, UnsupportedSegmentError
from parallel.faults import is_disk_full
from runner.compiler.backend import Compiled
from runner.compiler.counter import counted
from runner.compiler.few_rows import OPTIONS as FEW_ROWS
from runner.compiler.few_rows import TILES, may_pay, use_tiles
from runner.compiler.host import cpu_features, cpu_isa, gpu_name
from runner.compiler.kernel_timing import WAY, use_graphs
from runner.compiler.segment import Segment

LIBRARY = "segment.so"

_LOAD = """
import sys, torch
kind, library, device = sys.argv[1:]
if kind == "cuda":
    torch._C._aoti.AOTIModelContainerRunnerCuda(library, 1, device, "", True)
else:
    torch._C._aoti.AOTIModelContainerRunnerCpu(library, 1)
"""

_ON_GPU = {"aot_inductor.embed_kernel_binary": True}
_ONE_ROW = {"coordinate_descent_tuning": True}
"""With one row inductor writes matrix products as tuned reductions, which read weights faster than
the library does. With more rows they are kernels of their own (`runner.compiler.few_rows`), and
searching brings little for many seconds a segment.
"""
_VECTOR = {
    "coordinate_descent_check_all_directions": True,
    "realize_opcount_threshold": 4,
    "combo_kernels": True,
    "combo_kernels_pointwise_only": True,
}
"""A vector's products take nearly all time of its segment, so the search for them is wider. What is
multiplied, such as a norm, is computed once, not again for every column, and what is as small as a
rotation of queries and one of keys shares a kernel.
"""


class InductorBackend:
    """Builds for the device at hand, CPU or GPU."""

    name = "inductor"

    def __init__(self, device: torch.device, *, checks: bool = True) -> None:
        """
        Args:
            checks: `build` calls `check`.
        """
        self._device = device
        self._checks = checks
        self._loads = False
        self._fault: str | None = None

    def fingerprint(self) -> Mapping[str, str]:
        check_compiler()
        hardware = (
            gpu_name(self._device)
            if self._device.type == "cuda"
            else f"{cpu_isa()} {' '.join(cpu_features())}"
        )
        on_gpu = [_ON_GPU, _ONE_ROW, _VECTOR, FEW_ROWS, TILES, WAY]
        options = on_gpu if self._device.type == "cuda" else []
        return {"torch": torch.__version__, "hardware": hardware, "options": json.dumps(options)}

    def build(self, segment: Segment, program: torch.export.ExportedProgram, folder: Path) -> None:
        """See `Backend`.

        Raises:
            OSError: the disk is full.
            PreflightError: what the compiler makes on this host does not load.
        """
        self._raise_fault()
        from torch._inductor.utils import clear_caches  # seconds, which a run need not spend

        with (
            tempfile.TemporaryDirectory(dir=folder) as work,
            counted("inductor"),
            warnings.catch_warnings(),
            self._search(),
        ):
            made = Path(work, LIBRARY)
            try:
                # PyTorch's own code uses what it deprecates.
                warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
                warnings.filterwarnings("ignore", message="TypedStorage is", category=UserWarning)
                inputs, _ = program.example_inputs
                options = self._options(segment)
                options["aot_inductor.output_path"] = str(made)
                # A kernel that an earlier build had, too, would not be written for this one.
                clear_caches()
                torch._inductor.aot_compile(program.module(), inputs, options=options)
            except Exception as error:
                full = os.strerror(errno.ENOSPC)  # as a compiler that was called says it, too
                if is_disk_full(error) or full in str(error):
                    raise OSError(errno.ENOSPC, full, _fullest(folder)) from error
                raise UnsupportedSegmentError(
                    f"inductor cannot compile segment {segment.kind} ({_reason(error)}); use "
                    "compile.backend: eager or auto"
                ) from error
            if self._checks:
                self._check_loads(made)
            shutil.copyfile(made, folder / LIBRARY)

    def prepare(self) -> None:
        """See `Preparing`."""
        import torch._inductor.compile_fx  # noqa: F401

    def check(self, folder: Path) -> None:
        """See `Checking`."""
        self._check_loads(folder / LIBRARY)

    def load(self, folder: Path, segment: Segment) -> Compiled:
        library = str(folder / LIBRARY)
        runners: Any = torch._C._aoti
        try:
            if self._device.type == "cuda":
                # Single-threaded: else it asks after events, which a CUDA graph cannot hold.
                runner = runners.AOTIModelContainerRunnerCuda(
                    library, 1, str(self._device), "", True
                )
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

    def _check_loads(self, library: Path) -> None:
        """Load the first library in a process of its own: where the compiler links the C++ runtime
        statically, for example, loading one ends the process.
        """
        if self._loads:
            return
        self._raise_fault()
        done = subprocess.run(
            [sys.executable, "-c", _LOAD, self._device.type, str(library), str(self._device)],
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            said = done.stderr.strip().splitlines()
            reason = f"signal {-done.returncode}" if done.returncode < 0 else (said or ["?"])[-1]
            self._fault = (
                f"backend inductor: the libraries that {compiler()} makes here do not load "
                f"({reason}); use another compiler (CXX), or another backend"
            )
            self._raise_fault()
        self._loads = True

    def _raise_fault(self) -> None:
        """What was found once is true of every library."""
        if self._fault:
            raise PreflightError(self._fault)

    def _search(self) -> AbstractContextManager[object]:
        """What kernels are searched for in: on a GPU, a stream on which they can be timed."""
        if self._device.type == "cpu":
            return nullcontext()
        use_graphs()
        use_tiles()
        return torch.cuda.stream(torch.cuda.Stream(self._device))  # type: ignore[no-untyped-call]

    def _options(self, segment: Segment) -> dict[str, Any]:
        if self._device.type == "cpu":
            return {}
        if segment.num_rows != 1:
            return {**_ON_GPU, **(FEW_ROWS if may_pay(segment, self._device) else {})}
        first = segment.activations[0]
        is_vector = len(first.shape) == 2 and first.dtype.is_floating_point
        return {**_ON_GPU, **_ONE_ROW, **(_VECTOR if is_vector else {})}


def _fullest(folder: Path) -> str:
    """Of the folders that it writes to, that of the disk with the least space."""
    return min(str(folder), tempfile.gettempdir(), key=lambda name: shutil.disk_usage(name).free)


def _reason(error: Exception) -> str:
    """One line; where the C++ compiler failed, the first error that it tells."""
    lines = str(error).splitlines() or [""]
    told = next((line for line in lines if " error: " in line), lines[0])
    return f"{type(error).__name__}: {told.strip()}"


def compiler() -> str:
    """The C++ compiler that inductor calls."""
    return os.environ.get("CXX", "g++")


def check_compiler() -> None:
    """Raises PreflightError: there is no C++ compiler, or no openssl, by which inductor hashes."""
    if shutil.which(compiler()) is None:
        raise PreflightError(
            f"backend inductor needs a C++ compiler, {compiler()} is not on PATH; install g++, set "
            "CXX, or use compile.backend: eager"
        )
    if shutil.which("openssl") is None:
        raise PreflightError(
            "backend inductor needs the command openssl, which is not on PATH; install openssl, or "
            "use compile.backend: eager"
        )
