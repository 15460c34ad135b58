"""The life of a rank: join the others, load, step until rank 0 says to leave."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from parallel.collectives import broadcast_bytes
from parallel.context import ParallelContext
from parallel.errors import ConfigError, OutputClosedError, ShardlineError
from parallel.faults import as_rank_error
from parallel.launch import RankEnv
from runner.compiler.counter import compilations, watch_triton
from runner.engine.control import Control
from runner.engine.engine import Engine
from runner.engine.kv_capacity import agree_on_blocks, check_weights_fit
from runner.engine.loading import load_stage
from runner.engine.scheduler import BlockPool, Output, Scheduler
from runner.engine.stage_runner import StageRunner
from runner.planning import Job

_LOG = logging.getLogger(__name__)

_COLLECTIVE_TIMEOUT_S = {"cuda": 30.0, "cpu": 600.0}
"""A rank waits for the ranks before it, and a CPU may take minutes over a step."""


class Front(Protocol):
    """Rank 0's side of the clients: it knows text, clocks and who is waiting."""

    def kv_blocks(self, block_size: int) -> int:
        """How many KV blocks could be asked for at once."""
        ...

    def next(self) -> Control:
        """What to tell all ranks before the next step."""
        ...

    def take(self, outputs: list[Output]) -> None:
        """The tokens of a step."""
        ...


class Phase:
    """What a rank is doing, for the message if it fails."""

    def __init__(self) -> None:
        self.name = "starting"


@contextmanager
def as_rank(job: Job, env: RankEnv) -> Iterator[Phase]:
    """Say of whatever goes wrong inside which rank it was, and what it was doing.

    Raises:
        ShardlineError: a cause that the user can mend.
        RankLostError: anything else.
    """
    phase = Phase()
    try:
        yield phase
    except Exception as error:
        ours = _as_ours(error, phase)
        if env.world_size > 1:
            ours.rank = job.plan.topology.describe(env.rank)
        raise ours from error


def run_rank(job: Job, env: RankEnv, front: Front | None) -> None:
    """Run this process's rank to the end.

    Args:
        front: on rank 0 the source of requests; None elsewhere.

    Raises:
        ShardlineError: see `as_rank`.
    """
    with as_rank(job, env) as phase:
        rebuilds = job.on_mismatch == "rebuild"
        patience_s = job.config.distributed.build_timeout_s if rebuilds else None
        context = join(job, env, phase, setup_timeout_s=patience_s)
        if context.device.type == "cuda":
            watch_triton()
        phase.name = "loading weights"
        check_weights_fit(job.plan, context, job.config.kv_cache.gpu_memory_utilization)
        stage_runner = load_stage(job, context)
        phase.name = "allocating the KV cache"
        engine = make_engine(job, stage_runner, front)
        phase.name = "generating"
        loop(engine, front)
        stage_runner.transfer.drain()
        _LOG.debug("rank %d compiled: %s", env.rank, compilations() or "nothing")
        context.close()


def join(
    job: Job, env: RankEnv, phase: Phase, *, setup_timeout_s: float | None = None
) -> ParallelContext:
    """Meet the other ranks, and make sure that they have the same plan.

    Args:
        setup_timeout_s: how long ranks wait for one another between steps; None: as long as a
            start may take.
    """
    phase.name = "joining the other ranks"
    context = _open_context(job, env, setup_timeout_s)
    phase.name = "comparing plans"
    _check_same_plan(job, context)
    return context


def _as_ours(error: Exception, phase: Phase) -> ShardlineError:
    if isinstance(error, ShardlineError):
        return error
    if isinstance(error, BrokenPipeError):
        return OutputClosedError("standard output was closed before the text was complete")
    return as_rank_error(error, phase.name)


def loop(engine: Engine, front: Front | None) -> None:
    """Step until rank 0 says to leave; every rank of the job runs this."""
    while True:
        message = front.next().encode() if front else None
        control = Control.decode(broadcast_bytes(message, 0, engine.context.world))
        if control.leave:
            return
        engine.admit(control)
        if engine.has_work:
            outputs = engine.step()
            if front:
                front.take(outputs)


def _open_context(job: Job, env: RankEnv, setup_timeout_s: float | None) -> ParallelContext:
    device_type = job.device_type
    distributed = job.config.distributed
    timeout_s = distributed.collective_timeout_s or _COLLECTIVE_TIMEOUT_S[device_type]
    return ParallelContext.open(
        job.plan.topology,
        env,
        device_type=device_type,
        init_timeout_s=setup_timeout_s or distributed.init_timeout_s,
        collective_timeout_s=timeout_s,
    )


def _check_same_plan(job: Job, context: ParallelContext) -> None:
    """Ranks that read different files would compute nonsense together."""
    digest = job.plan.digest().encode()
    if broadcast_bytes(digest, 0, context.setup) != digest:
        raise ConfigError(
            f"rank {context.rank} made another plan than rank 0; give all ranks the same "
            "configuration and the same model folder"
        )


def make_engine(job: Job, stage_runner: StageRunner, front: Front | None) -> Engine:
    """Agree with the other ranks on the size of the KV cache, and put the engine together."""
    config, context = job.config, stage_runner.context
    block_size = config.kv_cache.block_size
    num_blocks = agree_on_blocks(
        front.kv_blocks(block_size) if front else 0,
        context,
        job.plan.ranks[context.rank],
        block_size=block_size,
        utilization=config.kv_cache.gpu_memory_utilization,
    )
    stage_runner.allocate(num_blocks, block_size)
    if stage_runner.padding and context.device.type == "cuda" and not config.compile.enforce_eager:
        stage_runner.capture(
            max_num_seqs=config.scheduler.max_num_seqs, max_model_len=job.plan.max_model_len
        )
    scheduler = Scheduler(
        BlockPool(num_blocks, block_size),
        max_num_seqs=config.scheduler.max_num_seqs,
        max_num_batched_tokens=config.scheduler.max_num_batched_tokens,
        rope_switch_length=job.spec.config.switch_length,
    )
    return Engine(scheduler, stage_runner, block_size)
