"""`shardline plan`: who holds what, before any GPU is touched."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from runner.cli.options import with_model_options

if TYPE_CHECKING:
    from parallel.autoplan import Candidate
    from runner.config.load import LoadedConfig
    from runner.planning import Job


@with_model_options
def plan(
    *,
    loaded: "LoadedConfig",
    auto: Annotated[
        bool, typer.Option("--auto", help="Choose tensor- and pipeline-parallel sizes.")
    ] = False,
    gpus: Annotated[
        int | None, typer.Option("--gpus", min=1, help="GPUs to plan for; else those found.")
    ] = None,
    gpu_memory_gb: Annotated[
        float | None,
        typer.Option("--gpu-memory-gb", min=0.001, help="Memory of a GPU, GB; else as found."),
    ] = None,
    rank: Annotated[
        int | None, typer.Option("--rank", help="List every tensor of this rank and its slice.")
    ] = None,
    svg: Annotated[
        Path | None, typer.Option("--svg", metavar="FILE", help="Draw the plan.")
    ] = None,
    show_config: Annotated[
        bool, typer.Option("--show-config", help="Print each effective value and its origin.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show who holds what: modules, slices and bytes of every rank, and what crosses between stages.

    Needs no GPU, and of the weights only the headers. Exits with 6 if the plan does not fit the
    memory given or found.
    """
    from parallel.errors import DoesNotFitError
    from runner.cli.plan_svg import draw
    from runner.cli.plan_text import describe_fit, describe_plan, describe_rank
    from runner.planning import Job

    if show_config and not as_json:
        from runner.config.show import show

        typer.echo(show(loaded) + "\n")
    memory_bytes = _memory_bytes(gpu_memory_gb)
    candidates: list[Candidate] = []
    if auto:
        job, candidates = _choose(loaded, gpus, memory_bytes)
    else:
        job = Job.prepare(loaded.config)
    fit = job.fit(memory_bytes) if memory_bytes else None

    if svg:
        svg.write_text(draw(job.plan))
    if as_json:
        typer.echo(json.dumps(_as_json(job, fit, candidates, loaded if show_config else None)))
    elif rank is not None:
        typer.echo(describe_rank(job.plan, rank))
    else:
        typer.echo(describe_plan(job.plan, candidates))
        if fit and memory_bytes:
            typer.echo(describe_fit(fit, memory_bytes))
    if fit and not fit.fits:
        raise DoesNotFitError(job.does_not_fit(fit, memory_bytes))
