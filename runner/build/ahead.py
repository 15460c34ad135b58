"""Artefacts built in several processes at once, before `Chooser` takes them up one by one.

Building is the work of one core for seconds a segment, and needs neither weights nor other ranks.
What a process could not build is left out here: `Chooser` meets it again, and says why.
"""

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, suppress
from pathlib import Path
from queue import SimpleQueue

import torch

from parallel.context import ParallelContext
from parallel.errors import PreflightError, ShardlineError
from runner.build.agenda import Agenda, Build
from runner.build.build_process import Answer, BuildProcess, Order
from runner.build.progress import Progress
from runner.build.worklist import Work
from runner.bundle.builder import BundleBuilder
from runner.compiler.backend import Backend, Caching, Checking, artefact_key
from runner.compiler.counter import counted
from runner.compiler.segment import save_program

_MOST_PROCESSES = 8
_FEWEST_BUILDS = 4
"""For fewer it does not pay to start processes, each of which imports PyTorch."""
_CORES_A_PROCESS = 2

_Done = tuple[Build, Path, Answer]


def count_processes(world_size: int) -> int:
    """How many a rank may start: half of its share of the cores."""
    cores = len(os.sched_getaffinity(0)) // world_size
    return min(_MOST_PROCESSES, cores // _CORES_A_PROCESS)


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
    builds: list[Build] = []
    crew: list[BuildProcess] = []
    with ExitStack() as stack:
        for build in _missing(works, backends, builder, context.device):
            builds.append(build)
            # They import what they build with while the rest of the segments are exported.
            wanted = min(len(builds), num_processes) if len(builds) >= _FEWEST_BUILDS else 0
            names = sorted({build.backend for build in builds})
            while len(crew) < wanted:
                process = BuildProcess(context.device, names, num_threads=_CORES_A_PROCESS)
                crew.append(stack.enter_context(process))
        if not crew:
            return {}
        desk = stack.enter_context(builder.desk("ahead"))
        progress = Progress(context.rank, len(builds), of="artefact")
        seconds: dict[str, float] = {}
        by_name = {backend.name: backend for backend in backends}
        faults: dict[str, str] = {}
        for build, folder, answer in _built(builds, crew, desk, faults):
            fault = answer.fault
            if not fault and (fault := _fault_of(folder, by_name[build.backend])):
                faults[build.backend] = fault
            if not fault:
                assert answer.seconds is not None
                with builder.artefact(build.key) as target:
                    shutil.copytree(folder, target, dirs_exist_ok=True)
                seconds[build.key] = answer.seconds
                if len(backends) > 1:  # Or nothing is loaded to choose by.
                    _complete(build, by_name[build.backend], builder.artefact_folder(build.key))
            progress.finished(str(build), how=f"not built: {fault}" if fault else build.backend)
    return seconds


def _fault_of(folder: Path, backend: Backend) -> str:
    """Why an artefact cannot be kept, if so. It is tried here, while others are being built."""
    try:
        if isinstance(backend, Checking):
            backend.check(folder)
    except PreflightError as error:
        return str(error)
    return ""


def _complete(build: Build, backend: Backend, folder: Path) -> None:
    """Where loading compiles the rest, do that too while others are being built: it is what loading
    it again need not do.
    """
    if isinstance(backend, Caching):
        with suppress(ShardlineError, RuntimeError):  # As the next load will say.
            backend.load(folder, build.segment)


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


def _built(
    builds: Sequence[Build],
    crew: Sequence[BuildProcess],
    desk: Path,
    faults: Mapping[str, str],
) -> Iterator[_Done]:
    """Build everything.

    Args:
        faults: by backend, what is found meanwhile to be wrong with all that it builds.

    Yields:
        Each build when it is done, the folder with its files, and what came of it.
    """
    orders = dict(_laid_out(builds, desk))
    agenda = Agenda(builds)
    idle: SimpleQueue[BuildProcess] = SimpleQueue()
    for process in crew:
        idle.put(process)

    def build_next() -> _Done:
        build, process = agenda.take(), idle.get()
        order = orders[build.key]
        folder = Path(order.folder)
        try:
            if fault := faults.get(build.backend):
                return build, folder, Answer(None, fault)
            with counted(build.backend):
                return build, folder, process.build(order)
        finally:
            idle.put(process)
            agenda.finished(build)

    with ThreadPoolExecutor(len(crew)) as threads:
        ends = [threads.submit(build_next) for _ in builds]
        try:
            for end in as_completed(ends):
                yield end.result()
        finally:
            for end in ends:
                end.cancel()


def _laid_out(builds: Sequence[Build], desk: Path) -> Iterator[tuple[str, Order]]:
    """The key and the order of each, whose program lies beside where its files will be. PyTorch
    saves one program at a time, and those that several backends build are saved once.
    """
    files: dict[int, Path] = {}
    for index, build in enumerate(builds):
        file = files.setdefault(id(build.program), desk / f"{index}.pt2")
        if not file.exists():
            save_program(build.program, file)
        yield (
            build.key,
            Order(
                backend=build.backend,
                kind=build.segment.kind,
                num_activations=len(build.segment.activations),
                program=str(file),
                folder=str(desk / str(index)),
            ),
        )
