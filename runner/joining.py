"""How a rank enters a job: it meets the others, makes sure that all have the same plan, and says of
its failures which rank it was. What it does then is the business of the engine, the pipeline or the
compiler.
"""

import gc
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from parallel.annotate import Annotate, for_nsight, for_torch, unnamed
from parallel.collectives import broadcast_bytes
from parallel.context import ParallelContext
from parallel.errors import ConfigError, OutputClosedError, PreflightError, ShardlineError
from parallel.faults import as_rank_error, is_disk_full
from parallel.launch import RankEnv
from parallel.progress import Doing, ProgressBoard, ProgressWriter
from runner.job import Job
from runner.observe.gpu_condition import judge_health
from runner.observe.numa import cores_near
from runner.observe.nvml import read_inventory

_LOG = logging.getLogger(__name__)

MOST_HOST_THREADS = 4
"""Threads that PyTorch may use for what a rank on a GPU does on the host, such as copying samples
into pinned memory: more are not faster, and all of them wait spinning (docs/measurements.md).
"""

_COLLECTIVE_TIMEOUT_S = {"cuda": 30.0, "cpu": 600.0}
"""A rank waits for the ranks before it, and a CPU may take minutes over a step."""


class Phase:
    """What a rank is doing, for the message if it fails, and for those who watch.

    Attributes:
        board: what all ranks are at.
        started_s: when this rank began, as `time.monotonic` has it.
        progress: where this rank says it.
    """

    def __init__(self, env: RankEnv) -> None:
        self.name = "starting"
        self.started_s = time.monotonic()
        self._rank = env.rank
        self.sees(_board_of(env))

    def __str__(self) -> str:
        """In its loop, what that is at."""
        doing = self.progress.doing
        return doing.words if doing.is_stepping else self.name

    def sees(self, board: ProgressBoard) -> None:
        """From now on this board has what all ranks are at."""
        self.board = board
        self.progress: ProgressWriter = board.writer(self._rank)


@contextmanager
def as_rank(job: Job, env: RankEnv) -> Iterator[Phase]:
    """Say of whatever goes wrong inside which rank it was, and what it was doing.

    Raises:
        ShardlineError: a cause that the user can mend.
        RankLostError: anything else.
    """
    phase = Phase(env)
    try:
        yield phase
    except Exception as error:
        ours = _as_ours(error, phase, job.device_type)
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
    phase.progress.enter(Doing.JOINING)
    context = _open_context(job, env, setup_timeout_s)
    if context.device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = job.config.compile.allow_tf32
    phase.name = "comparing plans"
    _check_same_plan(job, context)
    if env.progress_fd is None and env.world_size > 1:
        phase.sees(_shared_board(env, context))
    return context


def _board_of(env: RankEnv) -> ProgressBoard:
    """The launcher's; without one this rank's own, until `join`."""
    if env.progress_fd is not None:
        return ProgressBoard(env.progress_fd, env.world_size)
    return ProgressBoard.alone(env.world_size)


def _shared_board(env: RankEnv, context: ParallelContext) -> ProgressBoard:
    """One that rank 0 makes, where the launcher is torchrun."""
    # Rank 0 keeps the descriptor, by which the others find the memory.
    fd = ProgressBoard.anonymous_fd(env.world_size) if env.rank == 0 else None
    told = None if fd is None else f"/proc/{os.getpid()}/fd/{fd}".encode()
    path = broadcast_bytes(told, 0, context.setup)
    return ProgressBoard.at(Path(path.decode()), env.world_size)


def spare_collector() -> None:
    """Let the garbage collector pass over all that was loaded, which stays to the end. Else it goes
    through a million objects of libraries now and then in the middle of a step, and at the exit.
    """
    gc.collect()
    gc.freeze()


def patience_s(job: Job) -> float:
    """How long a rank may take over one thing before it counts as stalled."""
    timeout_s = job.config.distributed.collective_timeout_s
    return timeout_s or _COLLECTIVE_TIMEOUT_S[job.device_type]


def confine(job: Job, context: ParallelContext) -> None:
    """Keep a rank on a GPU to its share, so that another job beside it loses nothing.

    PyTorch's allocator ends where `kv_cache.gpu_memory_utilization` says, whatever it is asked for;
    what CUDA, NCCL and TensorRT take themselves comes on top. All threads run on the cores next to
    the GPU, and PyTorch's own are few.
    """
    if context.device.type != "cuda":
        return
    torch.set_num_threads(min(torch.get_num_threads(), MOST_HOST_THREADS))
    share = job.config.kv_cache.gpu_memory_utilization
    torch.cuda.set_per_process_memory_fraction(share, context.device)
    gpu: Any = torch.cuda.get_device_properties(context.device)  # its stub lacks the bus
    bus_id = f"{gpu.pci_domain_id:04x}:{gpu.pci_bus_id:02x}:{gpu.pci_device_id:02x}.0"
    allowed = os.sched_getaffinity(0)
    cores = cores_near(bus_id) & allowed
    if cores and cores != allowed:
        _pin(cores)
        _LOG.debug("rank %d runs on %d cores near %s", context.rank, len(cores), bus_id)


def _pin(cores: set[int]) -> None:
    """Move every thread that there is, those of communication included; later ones inherit it."""
    moved: set[str] = set()
    # One that was not moved yet may have started another.
    while others := set(os.listdir("/proc/self/task")) - moved:
        for thread in others:
            with suppress(ProcessLookupError):  # It may have ended meanwhile.
                os.sched_setaffinity(int(thread), cores)
        moved |= others


def annotation(job: Job) -> Annotate:
    """What a job that runs names its parts with; one that is compiled has no names, since tracing
    would make operations of them.
    """
    if not job.config.observability.nvtx:
        return unnamed
    return for_nsight if job.device_type == "cuda" else for_torch


def _as_ours(error: Exception, phase: Phase, device_type: str) -> ShardlineError:
    if isinstance(error, ShardlineError):
        return error
    if isinstance(error, BrokenPipeError):
        return OutputClosedError("standard output was closed before the text was complete")
    if is_disk_full(error):
        place = error.filename if isinstance(error, OSError) else None
        return PreflightError(
            f"{phase}: no space left on the disk of {place or tempfile.gettempdir()}; make room, "
            "or let TMPDIR name a folder on another disk"
        )
    ours = as_rank_error(error, str(phase))
    is_of_gpu = device_type == "cuda" and ("CUDA" in str(error) or "NCCL" in str(error))
    if is_of_gpu and (trouble := _gpu_trouble()):
        ours.args = (f"{ours}; {trouble}",)
    return ours


def _gpu_trouble() -> str:
    """What the driver says of GPUs that are lost or broken; empty: nothing."""
    inventory = read_inventory(with_pairs=False)
    if not inventory.gpus:
        return f"no GPU answers any more: {inventory.reason}"
    health = judge_health(inventory.gpus)
    return f"{health.detail}; {health.fix}" if health.status == "error" else ""


def _open_context(job: Job, env: RankEnv, setup_timeout_s: float | None) -> ParallelContext:
    device_type = job.device_type
    return ParallelContext.open(
        job.plan.topology,
        env,
        device_type=device_type,
        init_timeout_s=setup_timeout_s or job.config.distributed.init_timeout_s,
        collective_timeout_s=patience_s(job),
        all_reduce=job.config.distributed.all_reduce,
    )


def _check_same_plan(job: Job, context: ParallelContext) -> None:
    """Ranks that read different files would compute nonsense together."""
    digest = job.plan.digest().encode()
    if broadcast_bytes(digest, 0, context.setup) != digest:
        raise ConfigError(
            f"rank {context.rank} made another plan than rank 0; give all ranks the same "
            "configuration and the same model folder"
        )
