"""How a rank enters a job: it meets the others, makes sure that all have the same plan, and says of
its failures which rank it was. What it does then is the business of the engine, the pipeline or the
compiler.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from parallel.annotate import Annotate, for_nsight, for_torch, unnamed
from parallel.collectives import broadcast_bytes
from parallel.context import ParallelContext
from parallel.errors import ConfigError, OutputClosedError, ShardlineError
from parallel.faults import as_rank_error
from parallel.launch import RankEnv
from runner.job import Job

_COLLECTIVE_TIMEOUT_S = {"cuda": 30.0, "cpu": 600.0}
"""A rank waits for the ranks before it, and a CPU may take minutes over a step."""


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


def annotation(job: Job) -> Annotate:
    """What a job that runs names its parts with; one that is compiled has no names, since tracing
    would make operations of them.
    """
    if not job.config.observability.nvtx:
        return unnamed
    return for_nsight if job.device_type == "cuda" else for_torch


def _as_ours(error: Exception, phase: Phase) -> ShardlineError:
    if isinstance(error, ShardlineError):
        return error
    if isinstance(error, BrokenPipeError):
        return OutputClosedError("standard output was closed before the text was complete")
    return as_rank_error(error, phase.name)


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
        all_reduce=distributed.all_reduce,
    )


def _check_same_plan(job: Job, context: ParallelContext) -> None:
    """Ranks that read different files would compute nonsense together."""
    digest = job.plan.digest().encode()
    if broadcast_bytes(digest, 0, context.setup) != digest:
        raise ConfigError(
            f"rank {context.rank} made another plan than rank 0; give all ranks the same "
            "configuration and the same model folder"
        )
