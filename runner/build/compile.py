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

from parallel.collectives import Group
from parallel.context import ParallelContext
from parallel.launch import RankEnv
from runner.build.built import Built
from runner.build.choice import AUTO, Chooser
from runner.build.parity import ParityReport, compare
from runner.build.progress import Progress
from runner.build.sharing import barrier, gather
from runner.build.worklist import Work, worklist
from runner.bundle import layout
from runner.bundle.builder import BundleBuilder
from runner.bundle.host import Host
from runner.bundle.manifest import Manifest
from runner.bundle.source import SourceFile, read_source, source_digest
from runner.bundle.weights_file import read_weights
from runner.compiler.backends import Backends
from runner.engine.compiled_stage import CompiledStage
from runner.engine.kv_capacity import check_weights_fit
from runner.engine.loading import load_artefacts, make_runner, make_stage
from runner.engine.rank import Phase, as_rank, join
from runner.engine.stage_runner import StageRunner
from runner.models.attention import GatherAttention
from runner.models.decoder import DecoderStage
from runner.planning import Job

MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
)
"""What of a model's folder a bundle takes along, where it is there."""


@dataclass(frozen=True)
class Target:
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
            has_weights=job.config.model.load_format != "dummy",
        )


@dataclass(frozen=True)
class Outcome:
    """What a compile came to; known on rank 0."""

    built: tuple[Built, ...]
    parity: ParityReport

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compile_on_rank(job: Job, env: RankEnv, target: Target) -> Outcome:
    """Compile this rank's part of a job.

    A bundle that does not compute what the model computes is written all the same, and says so.

    Raises:
        ShardlineError: see `runner.engine.rank.as_rank`.
    """
    with as_rank(job, env) as phase:
        context = join(job, env, phase)
        outcome = compile_together(job, context, target, phase)
        context.close()
    return outcome


def compile_together(job: Job, context: ParallelContext, target: Target, phase: Phase) -> Outcome:
    """The same with ranks that have met already."""
    phase.name = "opening the bundle"
    source = source_of(job)
    with _builder(job, context, target) as builder:
        phase.name = "writing weights"
        write_weights(job, context.rank, builder, source)
        phase.name = "compiling"
        built = _compile(job, context, builder)
        parity = ParityReport(False, "not compared: compiled with --no-run")
        if not target.no_run:
            phase.name = "comparing with the uncompiled model"
            parity = _run(job, context, builder, built)
        phase.name = "publishing the bundle"
        barrier(context.setup)
        if context.rank == 0:
            publish(job, builder, Host.current(str(context.device)), source, built, parity)
    return Outcome(tuple(built), parity)


@contextmanager
def _builder(job: Job, context: ParallelContext, target: Target) -> Iterator[BundleBuilder]:
    """Rank 0 leads, the others join when it has begun."""
    if context.rank != 0:
        barrier(context.setup)
        yield BundleBuilder(target.path, job.plan, reuse_from=target.reuse_from)
        return
    with target.lead(job) as builder:
        barrier(context.setup)
        yield builder


def source_of(job: Job) -> dict[str, SourceFile]:
    """The files that the weights are read from; random ones come from none."""
    if job.config.model.load_format == "dummy":
        return {}
    return read_source(info.file for info in job.spec.checkpoint.tensors.values())


def write_weights(
    job: Job, rank: int, builder: BundleBuilder, source: dict[str, SourceFile]
) -> None:
    """Random weights are made again wherever they are needed."""
    if job.config.model.load_format == "dummy":
        return
    digest = source_digest(source)
    if not builder.finished_weights(rank, digest):
        dtype, device = getattr(torch, job.plan.dtype), torch.device("cpu")
        tensors = job.weights(rank, dtype=dtype, device=device)
        builder.write_weights(rank, tensors, source=digest)


def stages_of(job: Job) -> Iterator[DecoderStage]:
    """The stages of all ranks, on the meta device."""
    topology = job.plan.topology
    for rank in range(topology.world_size):
        here = topology.coordinate(rank)
        group = Group(tuple(topology.ranks(here.stage)), here.tp_rank)
        heads = job.plan.ranks[rank].heads
        attend = GatherAttention(heads, torch.device("cpu"))
        yield make_stage(job, rank, group, attend)


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
    if job.config.model.load_format == "dummy":
        weights = job.weights(
            context.rank, dtype=getattr(torch, job.plan.dtype), device=context.device
        )
    else:
        weights = read_weights(
            builder.folder / layout.weights_file(context.rank), device=context.device
        )
    runner = make_runner(job, context, weights)
    uses: dict[str, dict[int, tuple[str, str]]] = {}
    for made in built:
        for use in made.uses:
            if use.rank == context.rank:
                uses.setdefault(use.kind, {})[use.num_rows] = (made.backend, made.key)
    artefacts = load_artefacts(uses, builder.artefact_folder, runner.stage, backends)
    runner.execute, runner.buckets = CompiledStage(runner.stage, artefacts), job.buckets
    return runner


def publish(
    job: Job,
    builder: BundleBuilder,
    host: Host,
    source: dict[str, SourceFile],
    built: list[Built],
    parity: ParityReport,
) -> None:
    """Complete the bundle; `host` is what it was compiled for."""
    folder = job.spec.folder
    builder.copy_model_files(folder, [name for name in MODEL_FILES if (folder / name).is_file()])
    manifest = Manifest(
        plan=job.plan.to_dict(),
        plan_digest=job.plan.digest(),
        config=portable_config(job, host.device),
        source=source,
        host=host,
        artefacts={b.key: b.artefact for b in built},
        uses=uses_of(built, len(job.plan.ranks)),
        choices=tuple(choice for b in built for choice in b.choices),
        parity=parity.to_dict(),
        files={},
    )
    builder.publish(manifest, report={"built": [asdict(b) for b in built]})


def portable_config(job: Job, device_type: str) -> dict[str, Any]:
    """The configuration in effect, with nothing in it that only this host has."""
    config: dict[str, Any] = job.config.model_dump()
    config["model"] |= {
        "path": "model",
        "dtype": job.plan.dtype,
        "max_model_len": job.plan.max_model_len,
    }
    config["parallel"]["device"] = device_type
    return config


def uses_of(built: list[Built], world_size: int) -> tuple[dict[str, dict[int, str]], ...]:
    """For each rank: kind of part -> number of rows -> key of its artefact."""
    uses: tuple[dict[str, dict[int, str]], ...] = tuple({} for _ in range(world_size))
    for made in built:
        for use in made.uses:
            uses[use.rank].setdefault(use.kind, {})[use.num_rows] = made.key
    return uses
