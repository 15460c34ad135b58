"""`shardline plan`: who holds what and whether it fits, before any GPU is touched."""

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from parallel.errors import ConfigError, DoesNotFitError
from runner.cli.options import with_model_options
from runner.cli.table import plural

if TYPE_CHECKING:
    from parallel.autoplan import Candidate
    from parallel.decoder_plan import DecoderPlan
    from parallel.fit import Fit
    from runner.config.load import LoadedConfig

_SIZES = ("parallel.tensor_parallel_size", "parallel.pipeline_parallel_size")


@with_model_options
def plan(
    *,
    loaded: "LoadedConfig",
    auto: Annotated[
        bool, typer.Option("--auto", help="Choose the tensor- and pipeline-parallel size.")
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

    Needs no GPU, and of the weights only their headers. Exits with 6 if the plan does not fit into
    the memory that is given or found.
    """
    if gpus and not auto:
        raise ConfigError("--gpus counts only with --auto; add --auto, or give -tp and -pp")
    if as_json and rank is not None:
        raise ConfigError("--rank is for text; --json holds every rank, under plan.ranks")
    found = _gpus(loaded, gpu_memory_gb, needs_count=auto and gpus is None)
    result = _choose(loaded, found, gpus) if auto else _prepare(loaded, found)

    typer.echo(_as_json(result, show_config) if as_json else _as_text(result, rank, show_config))
    if svg:
        _draw(result.plan, svg)
    if result.fit and not result.fit.fits:
        raise DoesNotFitError(_shortage(result, result.fit))


@dataclass(frozen=True)
class _Gpus:
    """The GPUs to plan for.

    Attributes:
        count: how many were found; None if nobody looked.
        memory_bytes: of one; None if it is not known.
        origin: where `memory_bytes` comes from.
        absence: why there is nothing to find.
    """

    count: int | None = None
    memory_bytes: int | None = None
    origin: str = "given"
    absence: str = ""


@dataclass(frozen=True)
class _Result:
    """What is printed; `candidates` is empty without --auto."""

    loaded: "LoadedConfig"
    plan: "DecoderPlan"
    gpus: _Gpus
    fit: "Fit | None"
    candidates: "list[Candidate]" = field(default_factory=list)
    chosen: "Candidate | None" = None
    num_gpus: int = 0


def _gpus(loaded: "LoadedConfig", gpu_memory_gb: float | None, *, needs_count: bool) -> _Gpus:
    """What is given counts; the driver is asked for the rest."""
    if gpu_memory_gb is None:
        return _find_gpus(loaded.config.parallel.device)
    if not (math.isfinite(gpu_memory_gb) and gpu_memory_gb > 0):
        raise ConfigError(f"--gpu-memory-gb={gpu_memory_gb:g}: give a number above 0, such as 80")
    found = _find_gpus(loaded.config.parallel.device) if needs_count else _Gpus()
    return replace(found, memory_bytes=int(gpu_memory_gb * 10**9), origin="given")


def _find_gpus(device: str) -> _Gpus:
    """The GPUs of this host, unless the job is for a CPU."""
    if device == "cpu":
        return _Gpus(absence="parallel.device is cpu")

    from runner.observe.nvml import read_inventory

    inventory = read_inventory()
    sizes = [gpu.memory_total_bytes for gpu in inventory.gpus if gpu.memory_total_bytes]
    if not sizes:
        return _Gpus(absence=inventory.reason or "the driver tells the memory of no GPU")
    origin = "the GPU found here" if len(sizes) == 1 else f"the smallest of {len(sizes)} found here"
    return _Gpus(len(sizes), min(sizes), origin)


def _prepare(loaded: "LoadedConfig", gpus: _Gpus) -> _Result:
    from parallel.fit import fit_of
    from runner.planning import DecoderJob, budget_of

    made = DecoderJob.prepare(loaded.config).plan
    fit = fit_of(made, budget_of(loaded.config, gpus.memory_bytes)) if gpus.memory_bytes else None
    return _Result(loaded, made, gpus, fit)


def _choose(loaded: "LoadedConfig", gpus: _Gpus, count: int | None) -> _Result:
    """Plan with every possible pair of sizes and take the best; the closest where none fits."""
    from parallel.autoplan import assess, choose, closest, sizes
    from runner.models.spec import ModelSpec
    from runner.planning import budget_of, plan_of, with_sizes

    _refuse_sizes(loaded)
    num_gpus = count or gpus.count
    missing = [] if num_gpus else ["--gpus"]
    if not gpus.memory_bytes:
        missing.append("--gpu-memory-gb")
    if not num_gpus or not gpus.memory_bytes:
        raise ConfigError(f"--auto needs {' and '.join(missing)} here: {gpus.absence}")

    config = loaded.config
    spec = ModelSpec.open(Path(config.model.path), load_format=config.model.load_format)
    budget = budget_of(config, gpus.memory_bytes)
    candidates = [
        assess(plan_of(with_sizes(config, tp_size=tp_size, pp_size=pp_size), spec), budget)
        for tp_size, pp_size in sizes(spec.layout, num_gpus)
    ]
    chosen = choose(candidates) or closest(candidates)
    config = with_sizes(config, tp_size=chosen.tp_size, pp_size=chosen.pp_size)
    origins = loaded.origins | dict.fromkeys(_SIZES, "--auto")
    effective = replace(loaded, config=config, origins=origins)
    return _Result(effective, chosen.plan, gpus, chosen.fit, candidates, chosen, num_gpus)


def _refuse_sizes(loaded: "LoadedConfig") -> None:
    given = [key for key in _SIZES if loaded.origins[key] not in ("default", "parallel.stages")]
    if loaded.config.parallel.stages:
        given.append("parallel.stages")
    if given:
        raise ConfigError(
            f"--auto chooses the sizes, but {_where(loaded, given[0])}; drop it, or --auto"
        )


def _where(loaded: "LoadedConfig", key: str) -> str:
    """A key that is given, and where."""
    origins = [o for k, o in loaded.origins.items() if k == key or k.startswith(f"{key}.")]
    places = [origin for origin in origins if origin != "default"]
    return f"{key} is given" + (f" ({places[0]})" if places else "")


def _shortage(result: _Result, fit: "Fit") -> str:
    if not result.chosen:
        return f"the plan does not fit: {fit.shortage()}"
    chosen = result.chosen
    return (
        f"no sizes for up to {plural(result.num_gpus, 'GPU')} fit; the closest is "
        f"tensor_parallel_size={chosen.tp_size}, pipeline_parallel_size={chosen.pp_size}: "
        f"{fit.shortage()}"
    )


def _as_text(result: _Result, rank: int | None, show_config: bool) -> str:
    from runner.cli.fit_text import describe_candidates, describe_fit
    from runner.cli.plan_text import describe_plan, describe_rank
    from runner.config.show import show

    gpus, num_ranks = result.gpus, len(result.plan.ranks)
    parts = [show(result.loaded)] if show_config else []
    if result.chosen:
        parts.append(describe_candidates(result.candidates, result.chosen, result.num_gpus))
    parts.append(describe_plan(result.plan) if rank is None else describe_rank(result.plan, rank))
    if result.fit:
        parts.append(describe_fit(result.fit, gpus.origin))
    else:
        parts.append(f"Memory is not judged: {gpus.absence}, and no --gpu-memory-gb is given.")
    if gpus.count is not None and gpus.count < num_ranks:
        parts.append(f"The plan takes {num_ranks} GPUs; {gpus.count} were found here.")
    return "\n\n".join(parts)


def _as_json(result: _Result, show_config: bool) -> str:
    from runner.config.show import as_json

    values = {
        "plan": result.plan.to_dict(),
        "digest": result.plan.digest(),
        "fit": result.fit.to_dict() if result.fit else None,
        "candidates": [_candidate(c, result) for c in result.candidates] or None,
        "config": as_json(result.loaded) if show_config else None,
    }
    return json.dumps(values)


def _candidate(candidate: "Candidate", result: _Result) -> dict[str, Any]:
    return candidate.to_dict() | {"chosen": candidate is result.chosen}


def _draw(plan: "DecoderPlan", file: Path) -> None:
    from runner.cli.plan_svg import draw

    try:
        file.write_text(draw(plan))
    except OSError as error:
        raise ConfigError(
            f"--svg {file}: {error.strerror}; give a file that can be written"
        ) from None
