"""Build engines for a named GPU on a host without one; run by `tensorrt_target` as a process.

Torch-TensorRT asks CUDA about a device when it is imported and while it builds, and reads the
finished engine back, which needs the device. TensorRT-RTX itself does without. So this process
answers in the device's place; nothing else may, hence it cannot be imported.

    python -m runner.compiler.target_builder FOLDER    (with order.json and the saved programs)

It prints a line for every job when it is done: null, or why it cannot be built, as JSON.
"""

import gc
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO

if __name__ != "__main__":
    raise ImportError("runner.compiler.target_builder is a program; see tensorrt_target")

import torch

from parallel.errors import UnsupportedSegmentError
from runner.compiler.tensorrt import (
    BuildSettings,
    import_torch_tensorrt,
    write_artefact,
)
from runner.compiler.tensorrt_install import find_install, import_tensorrt
from runner.compiler.tensorrt_target import ORDER_FILE

_INTERPRETER = "torch_tensorrt.dynamo.conversion._TRTInterpreter"


class _Plan:
    """A finished engine that is never loaded; the builder only serializes it again."""

    def __init__(self, plan: Any) -> None:
        self._plan = bytes(plan)

    def serialize(self) -> bytes:
        return self._plan


def answer_for_device(target: str) -> None:
    """Answer what the import of Torch-TensorRT and its builder ask of a CUDA device."""
    number = int(target.removeprefix("sm"))
    torch.cuda.get_device_capability = lambda *_: divmod(number, 10)
    torch.cuda.current_device = lambda: 0
    torch.cuda.mem_get_info = lambda *_: (2**40, 2**40)
    if not hasattr(torch._C, "_CudaDeviceProperties"):
        setattr(torch._C, "_CudaDeviceProperties", object)  # noqa: B010


def import_without_runtime() -> None:
    """Import Torch-TensorRT without its C++ runtime, which needs the libraries of CUDA."""
    isfile = os.path.isfile
    os.path.isfile = lambda path: "libtorchtrt" not in str(path) and isfile(path)
    try:
        import_torch_tensorrt()
    finally:
        os.path.isfile = isfile


def build_for(target: str) -> None:
    """Make the interpreter build for `target` and return the plan without loading it."""
    trt = import_tensorrt("rtx")
    interpreter: Any = sys.modules[_INTERPRETER]
    populate = interpreter.TRTInterpreter._populate_trt_builder_config

    def populate_for_target(self: Any, *args: Any, **options: Any) -> Any:
        if self.ctx.net.num_outputs != len(self.output_dtypes):
            raise RuntimeError("it returns one tensor twice")
        config = populate(self, *args, **options)
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), 0)
        return config

    interpreter.TRTInterpreter._populate_trt_builder_config = populate_for_target
    runtime = SimpleNamespace(deserialize_cuda_engine=_Plan)
    names = {name: getattr(trt, name) for name in dir(trt)}
    interpreter.trt = SimpleNamespace(**{**names, "Runtime": lambda _log: runtime})


def take_stdout() -> TextIO:
    """What was standard output; whatever else is printed goes to standard error instead."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def main(desk: Path) -> None:
    """Build what `desk` orders."""
    answers = take_stdout()
    order = json.loads((desk / ORDER_FILE).read_text(encoding="utf-8"))
    target, settings = order["target"], BuildSettings(**order["settings"])
    answer_for_device(target)
    import_without_runtime()
    build_for(target)
    # Torch-TensorRT collects garbage after each build; let it not look at its own modules.
    gc.freeze()
    install = find_install()
    for i, job in enumerate(order["jobs"]):
        program = torch.export.load(desk / f"{i}.pt2")
        answer = None
        try:
            write_artefact(
                program,
                Path(job["folder"]),
                kind=job["kind"],
                settings=settings,
                install=install,
                target=target,
            )
        except UnsupportedSegmentError as error:
            answer = str(error)
        print(json.dumps(answer), file=answers, flush=True)


main(Path(sys.argv[1]))
