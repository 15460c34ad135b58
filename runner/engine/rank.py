"""The life of a rank: join the others, load, step until rank 0 says to leave."""

import logging
from collections.abc import Callable
from typing import Protocol

from parallel.annotate import for_torch
from parallel.announcements import Announcements
from parallel.collectives import minimum
from parallel.context import ParallelContext
from parallel.launch import RankEnv
from parallel.progress import Doing, ProgressBoard
from runner.compiler.counter import compilations, count_compilations, watch_triton
from runner.engine.control import Control
from runner.engine.engine import Engine
from runner.engine.kv_blocks import BlockPool
from runner.engine.kv_capacity import agree_on_blocks, check_weights_fit
from runner.engine.loading import load_stage
from runner.engine.scheduler import Output, Scheduler
from runner.engine.stage_runner import StageRunner
from runner.engine.step_profile import StepProfile
from runner.engine.step_size import StepSizes, rows_worth_capturing
from runner.engine.token_exchange import TokenExchange
from runner.joining import annotation, as_rank, confine, join, spare_collector
from runner.models.attention_choice import fit_block_size
from runner.planning import DecoderJob

_LOG = logging.getLogger(__name__)


class Front(Protocol):
    """Rank 0's side of the clients: it knows text, clocks and who is waiting."""

    def kv_blocks(self, block_size: int) -> int:
        """How many KV blocks could be asked for at once."""
        ...

    def begin(self, scheduler: Scheduler) -> None:
        """The model is loaded; no request may come to more tokens than `scheduler.max_length`."""
        ...

    def next(self) -> Control:
        """What to tell all ranks before the next step."""
        ...

    def take(self, outputs: list[Output]) -> None:
        """The tokens of a step."""
        ...


def run_rank(
    job: DecoderJob,
    env: RankEnv,
    front: Front | None,
    profile: StepProfile | None = None,
    *,
    show: Callable[[ProgressBoard], None] = lambda _: None,
) -> None:
    """Run this process's rank to the end.

    Args:
        front: on rank 0 the source of requests; None elsewhere.
        profile: records some of the steps, with names.
        show: gets what all ranks are at; twice, for under torchrun they share it once they have
            met.

    Raises:
        ShardlineError: see `as_rank`.
    """
    with as_rank(job, env) as phase:
        rebuilds = job.on_mismatch == "rebuild"
        patience_s = job.config.distributed.build_timeout_s if rebuilds else None
        show(phase.board)
        context = join(job, env, phase, setup_timeout_s=patience_s)
        show(phase.board)
        confine(job, context)
        phase.progress.enter(Doing.LOADING)
        context = context.annotated(for_torch if profile else annotation(job))
        if context.device.type == "cuda":
            watch_triton()
        phase.name = "loading weights"
        check_weights_fit(job.plan, context, job.config.kv_cache.gpu_memory_utilization)
        stage_runner = load_stage(job, context)
        stage_runner.annotate_segments()
        stage_runner.progress = phase.progress
        phase.progress.enter(Doing.PREPARING)
        phase.name = "allocating the KV cache"
        engine = make_engine(job, stage_runner, front)
        spare_collector()
        phase.name = "generating"
        loop(engine, front, profile)
        stage_runner.close()
        _LOG.debug("rank %d compiled: %s", env.rank, compilations() or "nothing")
        context.close()


def loop(engine: Engine, front: Front | None, profile: StepProfile | None = None) -> None:
    """Step until rank 0 says to leave; every rank of the job runs this."""
    if front:
        front.begin(engine.scheduler)
    num_behind = engine.context.topology.last_stage
    announcements = Announcements(0, engine.context.world, most_unread=num_behind)
    progress = engine.stage_runner.progress
    while True:
        progress.enter(Doing.AWAITING)
        message = front.next().encode() if front else None
        control = Control.decode(announcements.exchange(message))
        if control.leave:
            progress.enter(Doing.ENDING)
            break
        if not engine.has_work:
            progress.begin_work()
        engine.admit(control)
        if profile and control.added:
            engine.stage_runner.transfer.drain()
            announcements.drain()
            profile.begin_round()
        if engine.has_work:
            num_started = engine.num_started
            outputs = engine.step()
            if profile and engine.num_started > num_started:
                profile.end_step()
            if front:
                front.take(outputs)
            progress.end_step(engine.stage_runner.busy.seconds_so_far(), count_compilations())
        else:
            engine.rest()
    engine.drain()
    engine.stage_runner.transfer.drain()
    announcements.drain()
    if profile:
        profile.close()


def make_engine(job: DecoderJob, stage_runner: StageRunner, front: Front | None) -> Engine:
    """Agree with the other ranks on the size of the KV cache, and put the engine together."""
    config, context = job.config, stage_runner.context
    block_size = fit_blocks(job, stage_runner)
    num_blocks = agree_on_blocks(
        front.kv_blocks(block_size) if front else 0,
        context,
        job.plan.ranks[context.rank],
        block_size=block_size,
        utilization=config.kv_cache.gpu_memory_utilization,
    )
    stage_runner.allocate(num_blocks, block_size)
    if may_run_ahead(context):
        stage_runner.keep_latest(config.scheduler.max_num_seqs)
    capture_steps(job, stage_runner)
    sizes = None
    if padding := stage_runner.padding:
        captured = padding.captured.get("mixed", 0)
        sizes = StepSizes.of(job.plan, padding.buckets, context.device.type, captured=captured)
    scheduler = Scheduler(
        BlockPool(num_blocks, block_size),
        max_num_seqs=config.scheduler.max_num_seqs,
        max_num_batched_tokens=config.scheduler.max_num_batched_tokens,
        num_groups=context.topology.num_stages,
        runs_ahead=stage_runner.latest is not None,
        rope_switch_length=job.spec.config.switch_length,
        sizes=sizes,
    )
    return Engine(scheduler, stage_runner, block_size, TokenExchange(context))


def fit_blocks(job: DecoderJob, stage_runner: StageRunner) -> int:
    """Tokens of a KV block that the attention of all ranks can read; all must call this."""
    fitting = fit_block_size(stage_runner.stage.attend, job.config.kv_cache.block_size)
    return -minimum(-fitting, stage_runner.context.setup)


def capture_steps(job: DecoderJob, stage_runner: StageRunner) -> None:
    """Make CUDA graphs of decode steps, and of those with prompts for which the GPU would wait for
    the host, where they can be; all ranks together, after `allocate`.
    """
    config, is_on_gpu = job.config, stage_runner.context.device.type == "cuda"
    if not is_on_gpu or config.compile.enforce_eager or stage_runner.padding is None:
        return
    if stage_runner.can_capture():
        stage_runner.capture(
            max_num_seqs=config.scheduler.max_num_seqs,
            max_model_len=job.plan.max_model_len,
            mixed_rows=rows_worth_capturing(job.plan),
        )
    else:
        _LOG.warning("steps are no CUDA graphs, as their attention cannot be captured")


def may_run_ahead(context: ParallelContext) -> bool:
    """Whether steps are laid out one ahead. A CPU gains nothing by that; of several stages all but
    one work on other sequences meanwhile.
    """
    return context.device.type == "cuda" and context.topology.num_stages == 1
