"""From a job to a rank's stage of a tensor model at work, uncompiled or from a bundle."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from parallel.context import ParallelContext
from runner.compiler.backend import artefact_key
from runner.compiler.backends import Backends
from runner.compiler.kernels import check_kernels, watch_kernels
from runner.compiler.segment import Segment
from runner.graph_planning import GraphJob
from runner.pipeline.programs import batch_size, programs_of, weights_of
from runner.pipeline.stage_program import StageProgram
from runner.pipeline.stage_worker import Runs, StageWorker

Load = Callable[[Segment, int], Callable[..., tuple]]  # type: ignore[type-arg]
"""(segment, batch size) -> what runs it."""


def load_worker(job: GraphJob, context: ParallelContext) -> StageWorker:
    """Trace or read this rank's programs, load its weights and artefacts, and capture its graphs.

    Raises:
        IntegrityError: a weight or an artefact is not what the manifest says, or cannot be read.
        IncompatibleError: an artefact was made for another host.
        PreflightError: a backend is not usable here, and was to build what the bundle holds anew.
    """
    if job.bundle and job.on_mismatch is None:
        watch_kernels(context.device, job.bundle.caches(context.rank))
    programs = programs_of(job, context.rank, device=context.device.type)
    if job.bundle is None or job.on_mismatch == "eager":
        runs = runs_of(job, programs, lambda segment, _: segment.function())
    elif job.on_mismatch == "rebuild":
        runs = _rebuilt(job, programs, context)
    else:
        runs = _bundled(job, programs, context)
    weights = weights_of(job, context.rank, programs, device=context.device)
    return make_worker(job, context, programs, runs, weights)


def make_worker(
    job: GraphJob,
    context: ParallelContext,
    programs: Sequence[StageProgram],
    runs: Sequence[Runs],
    weights: Iterable[tuple[str, torch.Tensor]],
) -> StageWorker:
    """A worker of this rank; on a GPU its graphs are captured."""
    check_kernels(context)
    worker = StageWorker(programs, runs, dict(weights), context.tp, context.device)
    if context.device.type == "cuda" and not job.config.compile.enforce_eager:
        worker.capture()
    return worker


def runs_of(job: GraphJob, programs: Sequence[StageProgram], load: Load) -> list[Runs]:
    """For every bucket, what runs its segments."""
    return [
        {
            step.segment.kind: load(step.segment, batch_size(bucket, job.plan))
            for step in program.computations
        }
        for bucket, program in zip(job.plan.buckets, programs, strict=True)
    ]


def _bundled(
    job: GraphJob, programs: Sequence[StageProgram], context: ParallelContext
) -> list[Runs]:
    bundle = job.bundle
    assert bundle is not None
    backends = Backends(context.device)
    if caches := bundle.caches(context.rank):
        backends.read_caches(caches)
    uses = bundle.manifest.uses[context.rank]

    def load(segment: Segment, size: int) -> Callable[..., tuple]:  # type: ignore[type-arg]
        key = uses[segment.kind][size]
        backend = bundle.manifest.artefacts[key].backend
        return backends[backend].load(bundle.artefact(key), segment)

    return runs_of(job, programs, load)


def _rebuilt(
    job: GraphJob, programs: Sequence[StageProgram], context: ParallelContext
) -> list[Runs]:
    """The same segments by the same backends, built for this rank's device and not kept."""
    bundle = job.bundle
    assert bundle is not None
    backends = Backends(context.device)
    uses: Mapping[str, Mapping[int, str]] = bundle.manifest.uses[context.rank]
    with TemporaryDirectory(prefix="shardline-rebuild-") as name:

        def load(segment: Segment, size: int) -> Callable[..., tuple]:  # type: ignore[type-arg]
            backend = backends[bundle.manifest.artefacts[uses[segment.kind][size]].backend]
            program = segment.export(context.device)
            folder = Path(name) / artefact_key(segment.digest(program), backend)
            if not folder.exists():
                folder.mkdir()
                backend.build(segment, program, folder)
            return backend.load(folder, segment)

        return runs_of(job, programs, load)
