"""`shardline compile`: make a bundle of a model, which then runs without a compiler."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from runner.cli.options import with_model_options
from runner.cli.ranks import on_ranks

if TYPE_CHECKING:
    from parallel.launch import RankEnv
    from runner.build.compile import Outcome
    from runner.config.load import LoadedConfig


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
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Compile every shard of a model ahead of time.

    Which backend compiles is compile.backend of the configuration, such as
    `--set compile.backend=auto`. Starts its own ranks, or joins those that torchrun started.
    """
    from runner.planning import Job

    job = Job.prepare(loaded.config)

    def run(env: "RankEnv") -> "Outcome":
        from runner.build.compile import Target, compile_on_rank

        outcome = compile_on_rank(job, env, Target(output, overwrite, tuple(reuse_from or ())))
        if env.rank == 0:
            typer.echo(json.dumps(outcome.to_dict()) if as_json else _summary(outcome, output))
        return outcome

    on_ranks(job.plan.topology, run)


def _summary(outcome: "Outcome", output: Path) -> str:
    from runner.cli.table import table

    columns = ["segment", "rows>", "backend", "ops in it>", "build s>", "bytes>", "ranks"]
    rows = [
        [
            b.kind,
            str(b.num_rows),
            b.backend,
            f"{b.num_ops}",
            f"{b.seconds:.1f}",
            f"{b.num_bytes:,}",
            ",".join(map(str, sorted({u.rank for u in b.uses}))),
        ]
        for b in sorted(outcome.built, key=lambda b: (b.kind, b.num_rows))
    ]
    return "\n".join([*table(columns, rows), "", str(output)])
