"""`BuildProcess`: a process of its own that builds artefacts, one after the other, when asked to.

Orders go in and answers come out as lines of JSON. What the process does is `build_ordered`, which
`runner.build.ahead_worker` calls.
"""

import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from subprocess import PIPE, Popen
from types import TracebackType
from typing import Self

import torch

from parallel.errors import PreflightError, UnsupportedSegmentError
from runner.compiler.backend import Preparing
from runner.compiler.backends import Backends
from runner.compiler.segment import Segment, TensorSpec

_ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Order:
    """An artefact to be made of a program that lies in a file.

    Attributes:
        folder: where its files go; it must not exist.
    """

    backend: str
    kind: str
    num_activations: int
    program: str
    folder: str


@dataclass(frozen=True)
class Answer:
    """What came of an order.

    Attributes:
        seconds: that building took; None: there is no artefact.
        fault: why not, in a line.
    """

    seconds: float | None
    fault: str = ""


class BuildProcess:
    """Starts at once, to import what it builds with while there is nothing to build yet."""

    def __init__(self, device: torch.device, backends: Sequence[str], *, num_threads: int) -> None:
        """
        Args:
            backends: that it will build with.
            num_threads: that it may keep busy; inductor would take all cores for each process.
        """
        self._device = device
        self._backends = backends
        self._num_threads = num_threads
        self._process = self._start()

    def build(self, order: Order) -> Answer:
        """Build it, or find out why not. After a process that died comes another."""
        if self._process.poll() is not None:
            self._stop()
            self._process = self._start()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(asdict(order)) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            return Answer(None, f"its process ended with exit code {self._process.wait()}")
        return Answer(**json.loads(line))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    def _start(self) -> "Popen[str]":
        paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        program = [sys.executable, "-m", "runner.build.ahead_worker"]
        return Popen(
            [*program, str(self._device), str(os.getpid()), *self._backends],
            env={
                "TORCHINDUCTOR_COMPILE_THREADS": str(self._num_threads),
                **os.environ,
                "PYTHONPATH": os.pathsep.join(paths),
            },
            stdin=PIPE,
            stdout=PIPE,
            text=True,
        )

    def _stop(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):  # Of an order that nobody read.
                pipe.close()


def build_ordered(
    device: torch.device, names: Iterable[str], lines: Iterable[str]
) -> Iterator[Answer]:
    """What such a process does.

    Args:
        names: of the backends to build with.
        lines: an `Order` each.

    Yields:
        An answer to each order.
    """
    backends = Backends(device, checks=False)
    for backend in map(backends.__getitem__, names):
        if isinstance(backend, Preparing):
            with suppress(PreflightError):  # Building says so.
                backend.prepare()
    for line in lines:
        order = Order(**json.loads(line))
        program = torch.export.load(order.program)
        inputs = tuple(n.meta["val"] for n in program.graph.nodes if n.op == "placeholder")
        program.example_inputs = (inputs, {})
        activations = tuple(map(TensorSpec.of, inputs[: order.num_activations]))
        segment = Segment(order.kind, torch.nn.Identity(), activations)
        folder = Path(order.folder)
        folder.mkdir()
        started = time.monotonic()
        try:
            backends[order.backend].build(segment, program, folder)
        except (PreflightError, UnsupportedSegmentError, OSError) as error:
            yield Answer(None, str(error))
        else:
            yield Answer(time.monotonic() - started)
