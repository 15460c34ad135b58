"""The life of a rank that compiles: build a share of the segments, write its weights, compare, and
on rank 0 publish the bundle.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from parallel.context import ParallelContext
from parallel.launch import RankEnv
from runner.build.built import Built
from runner.build.choice import AUTO, Chooser
from runner.build.contents import publish, source_of, uses_of, write_weights
from runner.build.parity import ParityReport, compare
from runner.build.progress import Progress, announce
from runner.build.sharing import barrier, gather
from runner.build.worklist import Work, stages_of, worklist
from runner.bundle import layout
from runner.bundle.builder import BundleBuilder
from runner.bundle.host import Host
from runner.bundle.weights_file import read_weights
from runner.compiler.backends import Backends
from runner.engine.compiled_stage import CompiledStage
from runner.engine.kv_capacity import check_weights_fit
from runner.engine.loading import load_artefacts, make_runner, with_backends
from runner.engine.rank import Phase, as_rank, join
from runner.engine.stage_runner import StageRunner
from runner.planning import Job


@dataclass(frozen=True)
class Destination:
    """Where a bundle goes.

    Attributes:
        overwrite: a bundle that is there may be replaced.
        reuse_from: bundles whose artefacts may be taken over.
        no_run: what was built is not compared with the uncompiled model; the bundle says so.
    """

    path: Path
    overwrite: bool = False
    reuse_from: tuple[Path, ...] = ()
    no_run: bool = False

    def lead(self, job: Job) -> AbstractContextManager[BundleBuilder]:
        """Begin or resume the bundle; see `BundleBuilder.lead`."""
        return BundleBuilder.lead(
            self.path,
            job.plan,
            overwrite=self.overwrite,
            reuse_from=self.reuse_from,
            has_weights=not job.has_random_weights,
        )


@dataclass(frozen=True)
class Outcome:
    """What a compile came to; known on rank 0."""

    built: tuple[Built, ...]
    parity: ParityReport

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compile_on_rank(job: Job, env: RankEnv, destination: Destination) -> Outcome:
    """Compile this rank's part of a job.

    A bundle that does not compute what the model computes is written all the same, and says so.

    Raises:
        ShardlineError: see `runner.engine.rank.as_rank`.
    """
    with as_rank(job, env) as phase:
        patience_s = job.config.distributed.build_timeout_s
        context = join(job, env, phase, setup_timeout_s=patience_s)
        outcome = compile_together(job, context, destination, phase)
        context.close()
    return outcome


def compile_together(
    job: Job, context: ParallelContext, destination: Destination, phase: Phase
) -> Outcome:
    """The same with ranks that have met already."""
    _begin(context, phase, "hashing the checkpoint")
    source = source_of(job, context.setup)
    _begin(context, phase, "opening the bundle")
    with _builder(job, context, destination) as builder:
        _begin(context, phase, "writing weights")
        write_weights(job, context.rank, builder, source)
        _begin(context, phase, "compiling")
        built = _compile(job, context, builder)
        parity = ParityReport(False, "not compared: compiled with --no-run")
        if not destination.no_run:
            _begin(context, phase, "comparing with the uncompiled model")
            parity = _run(job, context, builder, built)
        _begin(context, phase, "publishing the bundle")
        barrier(context.setup)
        if context.rank == 0:
            publish(job, builder, Host.current(str(context.device)), source, built, parity)
    return Outcome(tuple(built), parity)


def _begin(context: ParallelContext, phase: Phase, name: str) -> None:
    """Enter a phase; rank 0 tells of it."""
    phase.name = name
    if context.rank == 0:
        announce(name)


@contextmanager
def _builder(
    job: Job, context: ParallelContext, destination: Destination
) -> Iterator[BundleBuilder]:
    """Rank 0 leads, the others join when it has begun."""
    if context.rank != 0:
        barrier(context.setup)
        yield BundleBuilder(destination.path, job.plan, reuse_from=destination.reuse_from)
        return
    with destination.lead(job) as builder:
        barrier(context.setup)
        yield builder


def _compile(job: Job, context: ParallelContext, builder: BundleBuilder) -> list[Built]:
    """Build every world_size-th segment; learn what the others made."""
    todo = worklist(stages_of(job), job.buckets, job.config.scheduler.max_num_seqs)
    mine = todo[context.rank :: context.world.size]
    backends = Backends(context.device)
    named = job.config.compile.backend
    chooser = Chooser(
        [backends[name] for name in (AUTO if named == "auto" else (named,))],
        builder,
        context.device,
        job.config.compile.parity.max_error_ratio,
    )
    progress = Progress(context.rank, len(mine))
    built = [_build_one(chooser, work, progress) for work in mine]
    return gather(Built, built, context.setup)


def _build_one(chooser: Chooser, work: Work, progress: Progress) -> Built:
    built = chooser.build(work)
    progress.finished(str(work), how=built.backend if built.seconds else "kept")
    return built


def _run(
    job: Job, context: ParallelContext, builder: BundleBuilder, built: list[Built]
) -> ParityReport:
    """Compare what was built with the uncompiled model, and keep what loading it has made."""
    backends = Backends(context.device)
    runner = _load(job, context, builder, built, backends)
    parity = compare(job, runner)
    runner.transfer.drain()
    with TemporaryDirectory(prefix="shardline-caches-") as caches:
        backends.write_caches(Path(caches))
        builder.copy_caches(context.rank, Path(caches))
    return parity


def _load(
    job: Job,
    context: ParallelContext,
    builder: BundleBuilder,
    built: list[Built],
    backends: Backends,
) -> StageRunner:
    """This rank's stage as it will run from the bundle."""
    check_weights_fit(job.plan, context, job.config.kv_cache.gpu_memory_utilization)
    if job.has_random_weights:
        weights = job.weights(
            context.rank, dtype=getattr(torch, job.plan.dtype), device=context.device
        )
    else:
        weights = read_weights(
            builder.folder / layout.weights_file(context.rank), device=context.device
        )
    runner = make_runner(job, context, weights)
    keys = uses_of(built, context.world.size)[context.rank]
    uses = with_backends(keys, {made.key: made.artefact for made in built})
    artefacts = load_artefacts(uses, builder.artefact_folder, runner.stage, backends)
    runner.execute, runner.buckets = CompiledStage(runner.stage, artefacts), job.buckets
    return runner
