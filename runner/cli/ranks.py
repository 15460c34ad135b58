"""A job on its ranks: processes started from here, those that torchrun started, or this one alone.

What a rank does is `runner.engine.rank`; starting and watching processes is `parallel.launch`.
"""

import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from runner.drawing.words import plural

if TYPE_CHECKING:
    from parallel.launch import RankEnv
    from parallel.topology import Topology
    from runner.engine.rank import Front
    from runner.engine.step_profile import StepProfile
    from runner.graph_planning import GraphJob
    from runner.job import Job
    from runner.pipeline.rank import PipelineReport, Use
    from runner.planning import DecoderJob

FrontT = TypeVar("FrontT", bound="Front")
Result = TypeVar("Result")


def on_ranks(
    topology: "Topology", run: Callable[["RankEnv"], Result], *, drains: bool = False
) -> Result | None:
    """Run something on every rank.

    Args:
        run: called in the process of each rank.
        drains: see `parallel.launch.run_ranks`.

    Returns:
        What it returned, in a process that was a rank; None in one that started ranks.

    Raises:
        ShardlineError: a rank failed.
    """
    from parallel.launch import RankEnv, adopt, run_ranks

    env = adopt()
    if env:
        topology.check_world_size(env.world_size)
    elif topology.world_size > 1:
        run_ranks(
            this_command(),
            topology.world_size,
            describe=topology.describe,
            environment=package_environment(),
            drains=drains,
        )
        return None
    return run(env or RankEnv(0, 1))


def run_job(
    job: "DecoderJob",
    make_front: Callable[[], FrontT],
    *,
    hold: Callable[[FrontT], AbstractContextManager[object]] = nullcontext,
    profile_of: "Callable[[int], StepProfile] | None" = None,
) -> FrontT | None:
    """Run a job to its end.

    Args:
        make_front: makes rank 0's source of requests. It is called on rank 0, and in the process
            that starts the ranks: a mistake that it finds is found before there are any.
        hold: what rank 0 holds, in its own process alone, from before it meets the others until
            all have ended.
        profile_of: what records steps of a rank.

    Returns:
        rank 0's front, in the process that was rank 0; None in every other.

    Raises:
        ShardlineError: a rank failed.
    """
    from parallel.launch import adopt

    env = adopt()
    front = None
    if env is None or env.rank == 0:
        front = make_front()
        if env is None or env.report_fd is None:
            say_what_runs(job)

    def run(env: "RankEnv") -> FrontT | None:
        from runner.engine.rank import run_rank

        with hold(front) if front else nullcontext():
            run_rank(job, env, front, profile_of(env.rank) if profile_of else None)
        return front

    return on_ranks(job.plan.topology, run)


def run_graph_job(job: "GraphJob", make_use: "Callable[[], Use]") -> "PipelineReport | None":
    """Run a tensor model to the end of what rank 0 does with it.

    Args:
        make_use: makes rank 0's own work; called where `make_front` of `run_job` is.

    Returns:
        What was done, in the process that was rank 0; None in every other.

    Raises:
        ShardlineError: a rank failed.
    """
    from parallel.launch import adopt

    env = adopt()
    use = None
    if env is None or env.rank == 0:
        use = make_use()
        if env is None or env.report_fd is None:
            say_what_runs(job)

    def run(env: "RankEnv") -> "PipelineReport | None":
        from runner.pipeline.rank import run_graph_rank

        return run_graph_rank(job, env, use)

    return on_ranks(job.plan.topology, run)


def this_command(*more: str) -> list[str]:
    """What starts the command that runs now once more, with further arguments."""
    # -P: a runner.py in the user's directory is not this package.
    return [sys.executable, "-P", "-m", "runner", *sys.argv[1:], *more]


def package_environment() -> dict[str, str]:
    """What `this_command` needs beside the environment, to find this package from anywhere."""
    root, inherited = str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": f"{root}{os.pathsep}{inherited}" if inherited else root}


def say_what_runs(job: "Job") -> None:
    """A line on standard error, before anything is loaded."""
    plan = job.plan
    sys.stderr.write(
        f"shardline: {_how(job)}, {plan.dtype}, {plural(len(plan.ranks), 'rank')}, "
        f"tensor-parallel sizes {list(plan.tp_sizes)}\n"
    )


def _how(job: "Job") -> str:
    """Which kernels run."""
    if job.bundle is None:
        return "eager (not compiled)"
    if job.on_mismatch == "eager":
        return "eager (the bundle was compiled for another host)"
    backends = ", ".join(sorted(job.bundle.manifest.backends))
    if job.on_mismatch == "rebuild":
        return f"compiling anew, the bundle is for another host ({backends})"
    return f"compiled ({backends})"
