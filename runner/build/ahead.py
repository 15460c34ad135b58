"""Artefacts built in several processes at once, before `Chooser` takes them up one by one.

Building is the work of one core for seconds a segment, and needs neither weights nor other ranks.
What a process could not build is left out here: `Chooser` meets it again, and says why.
"""

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE, Popen

import torch

from parallel.context import ParallelContext
from parallel.errors import PreflightError, UnsupportedSegmentError
from runner.build.progress import Progress
from runner.build.worklist import Work
from runner.bundle.builder import BundleBuilder
from runner.compiler.backend import Backend, artefact_key
from runner.compiler.backends import Backends
from runner.compiler.counter import counted
from runner.compiler.segment import Segment, TensorSpec, save_program

ORDER_FILE = "order.json"

_MOST_PROCESSES = 8
_FEWEST_BUILDS = 4
"""For fewer it does not pay to start processes, each of which imports PyTorch."""

_ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Build:
    """An artefact to be made."""

    backend: str
    segment: Segment
    program: torch.export.ExportedProgram
    key: str


def count_processes(world_size: int) -> int:
    """How many a rank may start: half of its share of the cores."""
    return min(_MOST_PROCESSES, len(os.sched_getaffinity(0)) // (2 * world_size))


def build_ahead(
    works: Sequence[Work],
    backends: Sequence[Backend],
    builder: BundleBuilder,
    context: ParallelContext,
    *,
    num_processes: int,
) -> dict[str, float]:
    """Make the artefacts that are not there yet, as far as it goes.

    Returns:
        For each that was made, by key, the seconds that it took.
    """
    if num_processes < 2:
        return {}
    builds = list(_missing(works, backends, builder, context.device))
    if len(builds) < _FEWEST_BUILDS:
        return {}
    progress = Progress(context.rank, len(builds), of="artefact")
    seconds: dict[str, float] = {}

    def run(share: list[Build], desk: Path) -> None:
        for build, folder, took in _built(share, desk):
            if took is not None:
                with builder.artefact(build.key) as target:
                    shutil.copytree(folder, target, dirs_exist_ok=True)
                seconds[build.key] = took
            what = f"{build.segment.kind} x {build.segment.num_rows}"
            progress.finished(what, how=build.backend if took is not None else "not built")

    shares = shares_of(builds, num_processes)
    with tempfile.TemporaryDirectory(prefix="shardline-build-") as name:
        desks = [Path(name) / str(i) for i in range(len(shares))]
        # In this thread: PyTorch saves one program at a time.
        for share, desk in zip(shares, desks, strict=True):
            _lay_out(share, desk, context.device)
        with ThreadPoolExecutor(num_processes) as threads:
            list(threads.map(run, shares, desks))
    return seconds


def shares_of(builds: Sequence[Build], count: int) -> list[list[Build]]:
    """Who builds what: those of one row, whose kernels are tuned by timing, one after the other."""
    tuned = [build for build in builds if build.segment.num_rows == 1]
    others = [build for build in builds if build.segment.num_rows != 1]
    shares = [tuned, *(others[i :: count - 1] for i in range(count - 1))]
    return [share for share in shares if share]


def _missing(
    works: Sequence[Work],
    backends: Sequence[Backend],
    builder: BundleBuilder,
    device: torch.device,
) -> Iterator[Build]:
    """What takes time to build and is not there; each key once."""
    seen: set[str] = set()
    for work in works:
        program = work.segment.export(device)
        digest = work.segment.digest(program)
        for backend in backends:
            if backend.name == "eager":
                continue
            try:
                key = artefact_key(digest, backend)
            except PreflightError:
                continue
            if key not in seen and not builder.finished_artefact(key):
                seen.add(key)
                yield Build(backend.name, work.segment, program, key)


def _lay_out(share: Sequence[Build], desk: Path, device: torch.device) -> None:
    """Write what a worker needs: the programs, and what to make of them."""
    desk.mkdir()
    for i, build in enumerate(share):
        save_program(build.program, desk / f"{i}.pt2")
    order = {
        "device": str(device),
        "builds": [
            {
                "backend": build.backend,
                "kind": build.segment.kind,
                "num_activations": len(build.segment.activations),
            }
            for build in share
        ],
    }
    (desk / ORDER_FILE).write_text(json.dumps(order), encoding="utf-8")


def _built(share: Sequence[Build], desk: Path) -> Iterator[tuple[Build, Path, float | None]]:
    """Build in a process of its own, which ends with this generator.

    Yields:
        Each build when it is done, the folder with its files, and its seconds; None: it failed.
    """
    with _worker(desk) as process:
        assert process.stdout is not None
        for i, build in enumerate(share):
            with counted(build.backend):
                line = process.stdout.readline()
            yield build, desk / str(i), json.loads(line) if line else None


@contextmanager
def _worker(desk: Path) -> Iterator["Popen[str]"]:
    paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    with Popen(
        [sys.executable, "-m", "runner.build.ahead_worker", str(desk), str(os.getpid())],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        stdout=PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def build_in_turn(desk: Path) -> Iterator[float | None]:
    """What a worker does: build what `desk` orders, each into a folder of its number."""
    order = json.loads((desk / ORDER_FILE).read_text(encoding="utf-8"))
    backends = Backends(torch.device(order["device"]))
    for i, build in enumerate(order["builds"]):
        program = torch.export.load(desk / f"{i}.pt2")
        inputs = tuple(n.meta["val"] for n in program.graph.nodes if n.op == "placeholder")
        program.example_inputs = (inputs, {})
        folder = desk / str(i)
        folder.mkdir()
        activations = tuple(map(TensorSpec.of, inputs[: build["num_activations"]]))
        segment = Segment(build["kind"], torch.nn.Identity(), activations)
        started = time.monotonic()
        try:
            backends[build["backend"]].build(segment, program, folder)
        except (PreflightError, UnsupportedSegmentError):
            yield None
        else:
            yield time.monotonic() - started
