"""The life of a rank of a tensor model: join the others, load, check, run until rank 0 leaves."""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from threading import Thread

from parallel.collectives import all_gather_bytes
from parallel.context import ParallelContext
from parallel.launch import RankEnv
from parallel.progress import Doing, ProgressBoard
from parallel.schedule import predict
from runner.compiler.counter import compilations
from runner.graph_planning import GraphJob
from runner.joining import annotation, as_rank, confine, join, spare_collector
from runner.pipeline.check import check_sharded, must_check
from runner.pipeline.follower import follow
from runner.pipeline.loading import load_worker
from runner.pipeline.pipeline import Pipeline
from runner.pipeline.stage_worker import StageWorker

_LOG = logging.getLogger(__name__)

Use = Callable[[Pipeline], None]
"""What rank 0 does with the pipeline, on a thread of its own; when it returns, all ranks end."""


@dataclass(frozen=True)
class PipelineReport:
    """What a pipeline did, known on rank 0.

    Attributes:
        num_batches: that went through it.
        seconds: from the first of them to the last result.
        busy_s: of each rank, computing.
        tp_sizes: ranks of each stage.
    """

    num_batches: int
    seconds: float
    busy_s: tuple[float, ...]
    tp_sizes: tuple[int, ...]

    @property
    def bubble(self) -> float:
        """Share of the ranks' time in which they did not compute, from first to last."""
        return self._idle_share(self.seconds)

    @property
    def predicted_bubble(self) -> float:
        """The same if stages that take these times did nothing else, and waited for nothing but one
        another.
        """
        if not any(self.busy_s):
            return 0.0
        ranks, stage_times = iter(self.busy_s), []
        for size in self.tp_sizes:
            stage_times.append(max(islice(ranks, size)) / self.num_batches)
        return self._idle_share(predict(stage_times, self.num_batches).makespan)

    def _idle_share(self, seconds: float) -> float:
        return max(0.0, 1 - sum(self.busy_s) / (len(self.busy_s) * seconds)) if seconds else 0.0


def run_graph_rank(
    job: GraphJob,
    env: RankEnv,
    use: Use | None,
    *,
    show: Callable[[ProgressBoard], None] = lambda _: None,
) -> PipelineReport | None:
    """Run this process's rank to the end.

    Args:
        use: on rank 0; None elsewhere.
        show: see `runner.engine.rank.run_rank`.

    Returns:
        On rank 0 what was done.

    Raises:
        ShardlineError: see `runner.joining.as_rank`.
    """
    with as_rank(job, env) as phase:
        rebuilds = job.on_mismatch == "rebuild"
        patience_s = job.config.distributed.build_timeout_s if rebuilds else None
        show(phase.board)
        context = join(job, env, phase, setup_timeout_s=patience_s).annotated(annotation(job))
        show(phase.board)
        confine(job, context)
        phase.progress.enter(Doing.LOADING)
        phase.name = "loading the model"
        worker = load_worker(job, context)
        all_gather_bytes(b"", context.setup)  # Loading takes some ranks longer than others.
        if must_check(job):
            phase.name = "comparing the shards with the whole model"
            run_worker(job, worker, context, partial(check_sharded, job) if use else None)
            worker.busy.reset()
        spare_collector()
        phase.name = "running the pipeline"
        worker.progress = phase.progress
        report = run_worker(job, worker, context, use)
        _LOG.debug("rank %d compiled: %s", env.rank, compilations() or "nothing")
        worker.close()
        context.close()
    return report


def run_worker(
    job: GraphJob, worker: StageWorker, context: ParallelContext, use: Use | None
) -> PipelineReport | None:
    """Drive the pipeline or follow it, with ranks that are ready."""
    if use is None:
        follow(worker, context)
        worker.progress.enter(Doing.ENDING)
        _gather_busy(worker, context)
        return None
    pipeline = Pipeline(worker, context, is_batched=job.plan.is_batched)
    user = _User(use, pipeline)
    pipeline.drive()
    worker.progress.enter(Doing.ENDING)
    # Before anything is raised: the others end well, whatever rank 0 met beside the pipeline.
    busy = _gather_busy(worker, context)
    user.finish()
    seconds = pipeline.last_s - pipeline.first_s
    return PipelineReport(pipeline.num_batches, seconds, busy, tuple(job.plan.tp_sizes))


class _User:
    """Rank 0's own work beside the pipeline; whatever it raises comes out of `finish`."""

    def __init__(self, use: Use, pipeline: Pipeline) -> None:
        self._use = use
        self._pipeline = pipeline
        self._error: BaseException | None = None
        self._thread = Thread(target=self._run, name="user", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            self._use(self._pipeline)
        except BaseException as error:
            self._error = error
        finally:
            self._pipeline.leave()


def _gather_busy(worker: StageWorker, context: ParallelContext) -> tuple[float, ...]:
    messages = all_gather_bytes(json.dumps(worker.busy.seconds()).encode(), context.setup)
    return tuple(float(json.loads(message)) for message in messages)
