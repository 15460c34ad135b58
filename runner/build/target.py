"""`shardline compile --target`: every segment of all ranks for a GPU that this host need not have.

One process, in which no rank runs and nothing is compared. Not here: how an engine is built without
a device (`runner.compiler.tensorrt_target`).
"""

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from parallel.collectives import Group
from runner.build.built import Built
from runner.build.choice import NAMED
from runner.build.compile import Destination, Outcome
from runner.build.contents import publish, source_of
from runner.build.progress import Progress
from runner.build.recipe import Recipe, Verdict, recipe_of
from runner.build.worklist import Work
from runner.bundle.builder import BundleBuilder
from runner.bundle.host import Host
from runner.bundle.manifest import Candidate
from runner.bundle.source import source_digest
from runner.compiler.backend import artefact_key
from runner.compiler.tensorrt_target import BuildJob, TensorRTTargetBackend
from runner.job import Job

_TRACED_ON = "cpu"
"""PyTorch may be one without CUDA; engines are built for the target all the same."""


@dataclass(frozen=True)
class Order:
    """A segment, its graph, and the key of the artefact that is wanted of it."""

    work: Work
    program: torch.export.ExportedProgram
    key: str


def compile_for_target(job: Job, destination: Destination, gpu: str) -> Outcome:
    """Compile all parts of a job into a bundle that says that it was not compared.

    Args:
        gpu: compute capability, such as "sm89".

    Raises:
        ConfigError: TensorRT does not build for it without the device, or the bundle's place is
            taken.
        UnsupportedSegmentError: a segment cannot be compiled.
        PreflightError: TensorRT is not installed or its builder does not start, or the disk has no
            room for the weights.
    """
    backend = TensorRTTargetBackend(gpu)
    backend.fingerprint()
    recipe = recipe_of(job, traced_on=_TRACED_ON)
    source = source_of(recipe.source_files, Group.alone())
    verdict = Verdict(False, f"not compared: built for {gpu} without a device")
    with destination.lead(recipe) as builder:
        for rank_plan in job.plan.ranks:
            recipe.write_weights(rank_plan.rank, builder, source=source_digest(source))
        built = _build(recipe, builder, backend)
        publish(recipe, builder, Host.of_target(gpu), source, built, verdict)
    return Outcome(tuple(built), verdict)


def _build(recipe: Recipe, builder: BundleBuilder, backend: TensorRTTargetBackend) -> list[Built]:
    orders = [_order(work, backend) for work in recipe.works()]
    missing: dict[str, Order] = {}
    progress = Progress(0, len(orders))
    for order in orders:
        # Segments of two kinds can be the same function.
        if order.key in missing or builder.finished_artefact(order.key):
            progress.finished(str(order.work), how="kept")
        else:
            missing[order.key] = order
    seconds = _build_missing(missing, builder, backend, progress) if missing else {}
    return [
        _built(order, builder, seconds[order.key] if missing.get(order.key) is order else 0.0)
        for order in orders
    ]


def _order(work: Work, backend: TensorRTTargetBackend) -> Order:
    program = work.segment.export(_TRACED_ON)
    return Order(work, program, artefact_key(work.segment.digest(program), backend))


def _build_missing(
    missing: dict[str, Order],
    builder: BundleBuilder,
    backend: TensorRTTargetBackend,
    progress: Progress,
) -> dict[str, float]:
    """Build what is wanted under each key; the seconds that each took."""
    seconds: dict[str, float] = {}
    started = time.monotonic()

    def keep(made: BuildJob) -> None:
        key = made.folder.name
        with builder.artefact(key) as folder:
            shutil.copytree(made.folder, folder, dirs_exist_ok=True)
        seconds[key] = time.monotonic() - started - sum(seconds.values())
        progress.finished(str(missing[key].work), how=backend.name)

    with builder.desk("target") as desk:
        backend.build_all(_jobs(missing, desk), on_built=keep)
    return seconds


def _jobs(missing: dict[str, Order], desk: Path) -> Sequence[BuildJob]:
    for key in missing:
        (desk / key).mkdir()
    return [BuildJob(o.work.segment.kind, o.program, desk / o.key) for o in missing.values()]


def _built(order: Order, builder: BundleBuilder, seconds: float) -> Built:
    chosen = Candidate(TensorRTTargetBackend.name, order.key)
    folder = builder.artefact_folder(order.key)
    return Built.of(
        order.work,
        order.program,
        folder,
        candidates=(chosen,),
        chosen=chosen,
        seconds=seconds,
        reason=NAMED,
    )
