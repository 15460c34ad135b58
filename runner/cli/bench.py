"""`shardline bench`: latency, throughput and start-up of a model, with fixed lengths, beside what
the device was measured to do in the same run. `bench serve`, which asks a server, is `bench_serve`.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from parallel.errors import ConfigError
from runner.cli.bench_output import AsJson, Output, check_writable, show
from runner.cli.bench_profile import DEFAULT_STEPS, Profile, ProfileSteps, Traces
from runner.cli.bench_serve import serve
from runner.cli.options import with_job_options
from runner.cli.ranks import package_environment, run_job, this_command

if TYPE_CHECKING:
    from runner.bench.front import RoundsFront
    from runner.bench.rounds import Repeat, Round
    from runner.bench.workload import Workload
    from runner.planning import DecoderJob

bench = typer.Typer(
    help="Measure latency, throughput, start-up or a server.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

bench.command("serve")(serve)

InputLen = Annotated[int, typer.Option("--input-len", min=1, help="Tokens of each prompt.")]
OutputLen = Annotated[int, typer.Option("--output-len", min=1, help="Tokens to generate for each.")]
WarmupRounds = Annotated[
    int, typer.Option("--warmup-rounds", min=0, help="First rounds, which do not count.")
]
MaxRounds = Annotated[
    int, typer.Option("--max-rounds", min=1, help="Most rounds; fewer once three agree in 2 %.")
]


@bench.command("latency")
@with_job_options("decoder")
def latency(
    *,
    job: "DecoderJob",
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="Requests that run together.")
    ] = 1,
    input_len: InputLen = 128,
    output_len: OutputLen = 128,
    warmup_rounds: WarmupRounds = 1,
    max_rounds: MaxRounds = 10,
    profile: Profile = None,
    profile_steps: ProfileSteps = DEFAULT_STEPS,
    as_json: AsJson = False,
    output: Output = None,
) -> None:
    """One batch: time to the first token, and of each decoding step.

    Rounds are repeated until three in a row agree within 2 %; those three are reported.
    """
    from runner.bench.report import latency_result
    from runner.bench.rounds import Repeat
    from runner.bench.workload import Workload

    if batch_size > job.config.scheduler.max_num_seqs:
        raise ConfigError(
            f"--batch-size {batch_size} exceeds scheduler.max_num_seqs="
            f"{job.config.scheduler.max_num_seqs}; use a smaller one, or "
            f"--set scheduler.max_num_seqs={batch_size}"
        )
    workload = Workload(batch_size, input_len, output_len)
    traces = Traces(profile, warmup_rounds, profile_steps) if profile else None
    repeat = Repeat(_decode_or_prefill, warmup_rounds + bool(traces), max_rounds)
    _run_rounds("latency", job, workload, repeat, latency_result, traces, as_json, output)


@bench.command("throughput")
@with_job_options("decoder")
def throughput(
    *,
    job: "DecoderJob",
    num_requests: Annotated[
        int, typer.Option("--num-requests", min=1, help="Requests that are sent at once.")
    ] = 256,
    input_len: InputLen = 128,
    output_len: OutputLen = 128,
    warmup_rounds: WarmupRounds = 1,
    max_rounds: MaxRounds = 5,
    profile: Profile = None,
    profile_steps: ProfileSteps = DEFAULT_STEPS,
    as_json: AsJson = False,
    output: Output = None,
) -> None:
    """Many requests at once, through the scheduler: requests and tokens per second."""
    from runner.bench.report import throughput_result
    from runner.bench.rounds import Repeat
    from runner.bench.workload import Workload

    workload = Workload(num_requests, input_len, output_len)
    traces = Traces(profile, warmup_rounds, profile_steps) if profile else None
    repeat = Repeat(lambda round_: round_.elapsed_s, warmup_rounds + bool(traces), max_rounds)
    _run_rounds("throughput", job, workload, repeat, throughput_result, traces, as_json, output)


@bench.command("startup")
@with_job_options("decoder")
def startup(
    *,
    job: "DecoderJob",
    starts: Annotated[
        int, typer.Option("--starts", min=1, help="How often the command is started.")
    ] = 3,
    input_len: InputLen = 128,
    first_token: Annotated[bool, typer.Option("--first-token", hidden=True)] = False,
    as_json: AsJson = False,
    output: Output = None,
) -> None:
    """From the start of a process to its first token, in several fresh processes.

    The page cache cannot be controlled: the first start finds it as it is, the later ones warm.
    """
    from runner.bench.workload import Workload

    workload = Workload(1, input_len, 1)
    workload.check(job.plan)
    if first_token:
        _tell_first_token(job, workload)
        return
    _run_starts(job, workload, starts, as_json, output)


def _decode_or_prefill(round_: "Round") -> float:
    """What must become stable; a workload of one token each does not decode."""
    from runner.bench.stats import summarize

    return summarize(round_.decode_steps_s or [round_.prefill_s]).median


def _run_rounds(
    benchmark: str,
    job: "DecoderJob",
    workload: "Workload",
    repeat: "Repeat",
    result_of: Callable[..., dict[str, Any]],
    traces: Traces | None,
    as_json: bool,
    output: Path | None,
) -> None:
    """Run the ranks; rank 0 prints, once all of them have ended well."""
    from runner.bench.floor import WorkCount

    workload.check(job.plan)
    check_writable(output)
    if traces:
        traces.prepare()
    front = run_job(
        job,
        lambda: _rounds_front(job, workload, repeat),
        profile_of=traces.of_rank if traces else None,
    )
    if front:
        result = result_of(front, repeat, WorkCount(job.plan, job.spec.config, workload))
        _finish(benchmark, job, workload, front.limits, result, as_json, output)
        if traces:
            typer.echo(traces.describe(len(job.plan.ranks), sys.argv[1:]), err=True)


def _rounds_front(job: "DecoderJob", workload: "Workload", repeat: "Repeat") -> "RoundsFront":
    from runner.bench.front import RoundsFront

    def measure() -> Any:
        import torch

        from runner.bench.measure import device_of, measure_limits

        return measure_limits(device_of(job), getattr(torch, job.plan.dtype))

    return RoundsFront(
        workload,
        repeat,
        vocab_size=job.spec.config.vocab_size,
        max_num_seqs=job.config.scheduler.max_num_seqs,
        measure_limits=measure,
    )


def _run_starts(
    job: "DecoderJob", workload: "Workload", starts: int, as_json: bool, output: Path | None
) -> None:
    from parallel.launch import adopt
    from runner.bench.report import startup_result
    from runner.bench.startup import time_start

    if adopt():
        raise ConfigError(
            "bench startup starts the ranks itself, to measure it; run it without torchrun"
        )
    check_writable(output)
    command, environment = this_command("--first-token"), {**os.environ, **package_environment()}
    result = startup_result([time_start(command, environment) for _ in range(starts)])
    _finish("startup", job, workload, None, result, as_json, output)


def _tell_first_token(job: "DecoderJob", workload: "Workload") -> None:
    from runner.bench.startup import FirstTokenFront

    def make_front() -> FirstTokenFront:
        return FirstTokenFront(
            workload,
            vocab_size=job.spec.config.vocab_size,
            max_num_seqs=job.config.scheduler.max_num_seqs,
            report=typer.echo,
        )

    run_job(job, make_front)


def _finish(
    benchmark: str,
    job: "DecoderJob",
    workload: "Workload",
    limits: Any,
    result: dict[str, Any],
    as_json: bool,
    output: Path | None,
) -> None:
    """Print the result, and write it."""
    from runner.bench.environment import read_environment
    from runner.bench.report import make_report
    from runner.cli.bench_text import describe

    report = make_report(
        benchmark,
        job,
        command=["shardline", *sys.argv[1:]],
        environment=read_environment(job),
        workload=workload,
        limits=limits,
        result=result,
    )
    show(report, describe, as_json=as_json, output=output)
