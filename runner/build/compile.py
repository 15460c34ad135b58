"""The life of a rank that compiles: build a share of the segments, write its weights, compare, and
on rank 0 publish the bundle.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from parallel.context import ParallelContext
from parallel.launch import RankEnv
from parallel.progress import Doing
from runner.build.ahead import build_ahead, count_processes
from runner.build.built import Built
from runner.build.choice import Chooser
from runner.build.contents import publish, source_of
from runner.build.progress import Progress, announce
from runner.build.recipe import Recipe, Verdict, recipe_of
from runner.build.sharing import barrier, gather
from runner.build.worklist import Work
from runner.bundle.builder import BundleBuilder
from runner.bundle.host import Host
from runner.bundle.source import source_digest
from runner.compiler.backends import Backends, candidates_of
from runner.compiler.kernels import keep_kernels, watch_kernels
from runner.job import Job
from runner.joining import Phase, as_rank, join


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

    def lead(self, recipe: Recipe) -> AbstractContextManager[BundleBuilder]:
        """Begin or resume the bundle; see `BundleBuilder.lead`."""
        return BundleBuilder.lead(
            self.path,
            recipe.job.plan,
            overwrite=self.overwrite,
            reuse_from=self.reuse_from,
            has_weights=bool(recipe.source_files),
        )


@dataclass(frozen=True)
class Outcome:
    """What a compile came to; known on rank 0."""

    built: tuple[Built, ...]
    parity: Verdict

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
        outcome = compile_together(recipe_of(job), context, destination, phase)
        context.close()
    return outcome


def compile_together(
    recipe: Recipe, context: ParallelContext, destination: Destination, phase: Phase
) -> Outcome:
    """The same with ranks that have met already."""
    watch_kernels(context.device)
    _begin(context, phase, "hashing the checkpoint")
    source = source_of(recipe.source_files, context.setup)
    _begin(context, phase, "opening the bundle")
    with _builder(recipe, context, destination) as builder:
        _begin(context, phase, "writing weights")
        recipe.write_weights(context.rank, builder, source=source_digest(source))
        _begin(context, phase, "compiling")
        built = _compile(recipe, context, builder)
        parity = Verdict(False, "not compared: compiled with --no-run")
        if not destination.no_run:
            _begin(context, phase, "comparing with the uncompiled model")
            parity = _run(recipe, context, builder, built)
        _begin(context, phase, "publishing the bundle")
        barrier(context.setup)
        if context.rank == 0:
            publish(recipe, builder, Host.current(str(context.device)), source, built, parity)
    return Outcome(tuple(built), parity)


def _begin(context: ParallelContext, phase: Phase, name: str) -> None:
    """Enter a phase; rank 0 tells of it."""
    phase.name = name
    phase.progress.enter(Doing.COMPILING)
    if context.rank == 0:
        announce(name, started_s=phase.started_s)


@contextmanager
def _builder(
    recipe: Recipe, context: ParallelContext, destination: Destination
) -> Iterator[BundleBuilder]:
    """Rank 0 leads, the others join when it has begun."""
    if context.rank != 0:
        barrier(context.setup)
        yield BundleBuilder(destination.path, recipe.job.plan, reuse_from=destination.reuse_from)
        return
    with destination.lead(recipe) as builder:
        barrier(context.setup)
        yield builder


def _compile(recipe: Recipe, context: ParallelContext, builder: BundleBuilder) -> list[Built]:
    """Build every world_size-th segment; learn what the others made."""
    mine = recipe.works()[context.rank :: context.world.size]
    backends = Backends(context.device)
    settings = recipe.job.config.compile
    candidates = [backends[name] for name in candidates_of(settings.backend)]
    num_processes = count_processes(context.world.size)
    seconds = build_ahead(mine, candidates, builder, context, num_processes=num_processes)
    chooser = Chooser(
        candidates,
        builder,
        context.device,
        settings.parity.max_error_ratio,
        allow_tf32=settings.allow_tf32,
        seconds_ahead=seconds,
    )
    progress = Progress(context.rank, len(mine))
    built = [_build_one(chooser, work, progress) for work in mine]
    return gather(Built, built, context.setup)


def _build_one(chooser: Chooser, work: Work, progress: Progress) -> Built:
    built = chooser.build(work)
    progress.finished(str(work), how=built.backend if built.seconds else "kept")
    return built


def _run(
    recipe: Recipe, context: ParallelContext, builder: BundleBuilder, built: list[Built]
) -> Verdict:
    """Compare what was built with the uncompiled model, and keep what loading it has made."""
    backends = Backends(context.device)
    verdict = recipe.compare(context, builder, built, backends)
    with builder.desk("caches") as caches:
        backends.write_caches(caches)
        keep_kernels(context.device, recipe.kernels, caches)
        builder.copy_caches(context.rank, caches)
    return verdict
