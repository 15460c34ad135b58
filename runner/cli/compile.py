"""`shardline compile`: make a bundle of a model, which then runs without a compiler."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from parallel.errors import ConfigError, ParityError
from runner.cli.options import with_model_options
from runner.cli.ranks import on_ranks

if TYPE_CHECKING:
    from parallel.launch import RankEnv
    from runner.build.compile import Outcome
    from runner.config.load import LoadedConfig
    from runner.config.schema import RunnerConfig
    from runner.job import Job


@with_model_options
def compile_model(
    *,
    loaded: "LoadedConfig",
    output: Annotated[Path, typer.Option("--output", metavar="DIR", help="The bundle to write.")],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a bundle that is there.")
    ] = False,
    reuse_from: Annotated[
        list[Path] | None,
        typer.Option(
            "--reuse-from", metavar="BUNDLE", help="Take over artefacts that fit; repeatable."
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            metavar="SM",
            help="Build for a GPU that need not be here, such as sm89; with --no-run.",
        ),
    ] = None,
    no_run: Annotated[
        bool, typer.Option("--no-run", help="Do not compare with the uncompiled model.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Compile every shard of a model ahead of time.

    Which backend compiles is compile.backend of the configuration, such as
    `--set compile.backend=auto`. Starts its own ranks, or joins those that torchrun started;
    `--target` compiles all parts in one process and needs no GPU.
    """
    from runner.bundle.host import own_version
    from runner.bundle.layout import MANIFEST
    from runner.bundle.replacement import check_target
    from runner.cli.compile_text import summary
    from runner.cli.preflight import check_model
    from runner.jobs import prepare

    own_version()  # The bundle will name it: better missed now than after hours of work.
    if target is None:
        check_model(loaded, compiles=True)
    else:
        _check_may_target(target, loaded.config, no_run=no_run)
    job = prepare(loaded.config)
    check_target(output.resolve(), overwrite=overwrite)
    for bundle in reuse_from or ():
        if not (bundle / MANIFEST).is_file():
            raise ConfigError(f"--reuse-from {bundle}: no bundle is there; give the folder of one")
    if target is None:
        _check_can_build(job)

    def show(outcome: "Outcome") -> None:
        typer.echo(json.dumps(outcome.to_dict()) if as_json else summary(outcome, output))
        if not outcome.parity.passed and not no_run:
            raise ParityError(f"{output}: {outcome.parity.reason}")

    def run(env: "RankEnv") -> None:
        from runner.build.compile import Destination, compile_on_rank

        goal = Destination(output, overwrite, tuple(reuse_from or ()), no_run)
        outcome = compile_on_rank(job, env, goal)
        if env.rank == 0:
            show(outcome)

    if target is None:
        on_ranks(job.plan.topology, run)
        return
    from runner.build.compile import Destination
    from runner.build.target import compile_for_target

    show(compile_for_target(job, Destination(output, overwrite, tuple(reuse_from or ())), target))


def _check_may_target(target: str, config: "RunnerConfig", *, no_run: bool) -> None:
    """Raises ConfigError: what else was asked for cannot be had for a GPU that is not here."""
    from parallel.launch import adopt

    if not no_run:
        raise ConfigError(
            f"--target {target} builds for a GPU that need not be here, so nothing can be "
            "compared; add --no-run, or leave --target out to compile for this host"
        )
    if config.compile.backend != "tensorrt":
        raise ConfigError(
            f"--target {target} needs compile.backend: tensorrt, and it is "
            f"{config.compile.backend}; no other backend builds for a GPU that is not here"
        )
    if config.parallel.device == "cpu":
        raise ConfigError(
            f"--target {target} builds for a GPU, and parallel.device is cpu; make it cuda or auto"
        )
    if (env := adopt()) and env.world_size > 1:
        raise ConfigError(
            f"--target {target} compiles the parts of all ranks in one process, and torchrun "
            f"started {env.world_size}; run shardline compile without it"
        )


def _check_can_build(job: "Job") -> None:
    """What can be known before any rank starts."""
    from runner.compiler.backends import check_backend
    from runner.compiler.buckets import buckets_of

    if job.plan.kind == "decoder":
        buckets_of(job.config.compile.buckets, job.config.scheduler.max_num_batched_tokens)
    if job.config.compile.backend != "auto":
        check_backend(job.config.compile.backend, job.device_type)
