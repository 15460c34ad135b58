"""Load engines with the Python API of TensorRT alone; `torch_tensorrt` is not imported.

Not here: how an engine is built (`tensorrt`) and how it runs (`tensorrt_engine`).
"""

from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from parallel.errors import IncompatibleError, IntegrityError
from runner.compiler.host import target_of
from runner.compiler.segment import Segment, TensorSpec
from runner.compiler.tensorrt_engine import LoadedEngine, Scratch
from runner.compiler.tensorrt_install import Flavour, import_tensorrt
from runner.compiler.tensorrt_io import ENGINE_FILE, EngineIO

_DTYPES = {
    torch.float32: "FLOAT",
    torch.float16: "HALF",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "FP8",
    torch.int64: "INT64",
    torch.int32: "INT32",
    torch.int8: "INT8",
    torch.uint8: "UINT8",
    torch.bool: "BOOL",
}


class EngineRuntime:
    """What all engines of one rank share: TensorRT's runtime, scratch memory and, with RTX, the
    kernels that were compiled for this GPU.

    Engines share scratch memory, so they must run one after the other, on one stream.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._scratch = Scratch(device)
        self._kernels: bytes = b""
        self._flavour: Flavour | None = None
        self._trt: Any = None
        self._log: Any = None
        self._runtime: Any = None
        self._cache: Any = None

    def load(self, folder: Path, segment: Segment) -> LoadedEngine:
        """Read the artefact in `folder`.

        Raises:
            IntegrityError: a file is absent or damaged.
            IncompatibleError: the engine is for another GPU, TensorRT or segment.
            PreflightError: its flavour of TensorRT is not installed.
        """
        io = EngineIO.read(folder)
        _check_segment(io, segment, folder)
        self._start(io)
        file = folder / ENGINE_FILE
        if io.target != target_of(self._device):
            # RTX loads some of them, and makes kernels for this GPU out of plans for another.
            raise IncompatibleError(self._mismatch(io, file))
        try:
            plan = file.read_bytes()
        except OSError as error:
            raise IntegrityError(f"cannot read {file}: {error.strerror}") from error
        self._log.errors.clear()
        with torch.cuda.device(self._device):
            engine = self._runtime.deserialize_cuda_engine(plan)
            context = None if engine is None else self._make_context(engine)
        if context is None:
            raise IncompatibleError(self._why_not(io, plan, file))
        _check_engine(engine, io, folder)
        return LoadedEngine(engine, context, io, segment.kind, self._scratch, self._log)

    def read_kernels(self, file: Path) -> None:
        """Take over what `write_kernels` wrote, before the first `load`.

        RTX compiles an engine's kernels when it is loaded; those in the file it need not. A file of
        another GPU or version changes nothing but the time that loading takes.
        """
        self._kernels = file.read_bytes()

    def write_kernels(self, file: Path) -> bool:
        """Keep the kernels that RTX compiled so far; False where there are none to keep."""
        if self._cache is None:
            return False
        file.write_bytes(bytes(memoryview(self._cache.serialize())))
        return True

    def _start(self, io: EngineIO) -> None:
        if self._flavour is None:
            self._flavour = io.flavour
            self._trt = import_tensorrt(io.flavour)
            self._log = make_log(self._trt)
            self._runtime = self._trt.Runtime(self._log)
        elif self._flavour != io.flavour:
            raise IncompatibleError(
                f"the bundle holds engines of two flavours, {self._flavour} and {io.flavour}, and "
                "a process can hold one; run shardline compile again"
            )

    def _why_not(self, io: EngineIO, plan: bytes, file: Path) -> str:
        reasons = [*_diagnose(self._trt, self._runtime, plan), *self._log.errors]
        return f"{self._mismatch(io, file)}. TensorRT says: {'; '.join(reasons) or 'nothing'}"

    def _mismatch(self, io: EngineIO, file: Path) -> str:
        found = f"{io.target} with TensorRT {io.tensorrt} ({io.flavour})"
        here = f"{target_of(self._device)} with TensorRT {self._trt.__version__} ({self._flavour})"
        return (
            f"{file} is an engine for {found}, and this GPU is {here}; run shardline compile on "
            "this host"
        )

    def _make_context(self, engine: Any) -> Any:
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self._flavour == "standard":
            return engine.create_execution_context(strategy)
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        config.cuda_graph_strategy = self._trt.CudaGraphStrategy.DISABLED
        config.set_runtime_cache(self._shared_cache(config))
        return engine.create_execution_context(config)

    def _shared_cache(self, config: Any) -> Any:
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            if self._kernels:
                self._cache.deserialize(self._kernels)
        return self._cache


def make_log(trt: ModuleType) -> Any:
    """A TensorRT logger that prints nothing and keeps the errors in `errors`."""

    class Log(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        @property
        def last(self) -> str:
            return self.errors[-1] if self.errors else "no message"

        def log(self, severity: Any, message: str) -> None:
            if severity in (self.ERROR, self.INTERNAL_ERROR):
                self.errors.append(message)

    return Log()


def _diagnose(trt: ModuleType, runtime: Any, plan: bytes) -> list[str]:
    """RTX can tell in a word what is wrong with an engine; the standard flavour cannot."""
    if not hasattr(runtime, "get_engine_validity"):
        return []
    _, found = runtime.get_engine_validity(plan)
    kinds = trt.EngineInvalidityDiagnostics.__members__.items()
    return [name.lower().replace("_", " ") for name, kind in kinds if kind.value & found]


def _check_segment(io: EngineIO, segment: Segment, folder: Path) -> None:
    built, wanted = list(io.takes), list(segment.inputs)
    if built == wanted:
        return
    raise IncompatibleError(
        f"the engine in {folder} takes {_say(built)}; segment {segment.kind!r} of this model "
        f"passes {_say(wanted)}; run shardline compile again"
    )


def _say(specs: list[TensorSpec]) -> str:
    return ", ".join(map(str, specs)) or "nothing"


def _check_engine(engine: Any, io: EngineIO, folder: Path) -> None:
    names = {engine.get_tensor_name(i) for i in range(engine.num_io_tensors)}
    described = {**io.inputs, **io.outputs}
    wrong = sorted(names ^ set(described))
    if wrong:
        raise IncompatibleError(
            f"the engine in {folder} and its io.json differ in {', '.join(wrong)}; run shardline "
            "compile again"
        )
    for name, spec in described.items():
        found = f"{engine.get_tensor_dtype(name).name} {list(engine.get_tensor_shape(name))}"
        if found != f"{_DTYPES.get(spec.dtype)} {list(spec.shape)}":
            raise IncompatibleError(
                f"tensor {name} of the engine in {folder} is {found}, and its io.json says {spec}; "
                "run shardline compile again"
            )
