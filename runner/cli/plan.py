"""`shardline plan`: who holds what and whether it fits, before any GPU is touched."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from parallel.errors import ConfigError, DoesNotFitError
from runner.cli.options import with_model_options
from runner.cli.plan_decoder import DecoderResult
from runner.cli.plan_graph import GraphResult
from runner.cli.plan_inputs import find_gpus

if TYPE_CHECKING:
    from runner.config.load import LoadedConfig

Result = DecoderResult | GraphResult


@with_model_options
def plan(
    *,
    loaded: "LoadedConfig",
    auto: Annotated[
        bool, typer.Option("--auto", help="Choose the sizes; of a tensor model, how many stages.")
    ] = False,
    gpus: Annotated[
        int | None,
        typer.Option("--gpus", min=1, help="With --auto: how many GPUs; else those found here."),
    ] = None,
    gpu_memory_gb: Annotated[
        float | None,
        typer.Option(
            "--gpu-memory-gb", help="Memory of one GPU in GB (10^9 bytes); else as found here."
        ),
    ] = None,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure", help="Time a tensor model's parts and compiled stages here; cut by that."
        ),
    ] = False,
    rank: Annotated[
        int | None, typer.Option("--rank", help="List every tensor of this rank and its slices.")
    ] = None,
    svg: Annotated[
        Path | None, typer.Option("--svg", metavar="FILE", help="Draw the plan.")
    ] = None,
    show_config: Annotated[
        bool, typer.Option("--show-config", help="Print each effective value and its origin.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show who holds what: the modules, slices and bytes of every rank, and what crosses between.

    Needs no GPU, and of a language model's weights only their headers; only --measure runs the
    model. Exits with 6 if the plan does not fit into the memory that is given or found.
    """
    if gpus and not auto:
        raise ConfigError("--gpus counts only with --auto; add --auto, or give -tp and -pp")
    if as_json and rank is not None:
        raise ConfigError("--rank is for text; --json holds every rank, under plan.ranks")
    if measure:
        _check_measure(loaded, auto=auto)
    found = find_gpus(loaded, gpu_memory_gb, needs_count=auto and gpus is None)
    kind: type[Result] = DecoderResult if loaded.config.model.kind == "decoder" else GraphResult
    if measure:
        result: Result = GraphResult.measure(loaded, found)
    else:
        result = kind.choose(loaded, found, gpus) if auto else kind.prepare(loaded, found)

    typer.echo(_as_json(result, show_config) if as_json else _as_text(result, rank, show_config))
    if svg:
        _draw(result, svg)
    if shortage := result.shortage():
        raise DoesNotFitError(shortage)


def _check_measure(loaded: "LoadedConfig", *, auto: bool) -> None:
    if loaded.config.model.kind == "decoder":
        raise ConfigError(
            f"--measure is for tensor models, and {loaded.config.model.path} is a language model, "
            "whose layers are alike; leave it out, or cut by hand with parallel.stages"
        )
    if auto:
        raise ConfigError(
            "--measure cuts into a given number of stages and --auto chooses it; run --auto first, "
            "then --measure with -pp"
        )


def _as_text(result: Result, rank: int | None, show_config: bool) -> str:
    from runner.config.show import show

    parts = [show(result.loaded)] if show_config else []
    parts += result.describe(rank)
    return "\n\n".join([*parts, *result.gpus.describe(len(result.plan.ranks))])


def _as_json(result: Result, show_config: bool) -> str:
    from runner.config.show import as_json

    values = {
        "plan": result.plan.to_dict(),
        "digest": result.plan.digest(),
        **result.to_dict(),
        "config": as_json(result.loaded) if show_config else None,
    }
    return json.dumps(values)


def _draw(result: Result, file: Path) -> None:
    try:
        file.write_text(result.draw())
    except OSError as error:
        raise ConfigError(
            f"--svg {file}: {error.strerror}; give a file that can be written"
        ) from None
