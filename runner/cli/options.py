"""The options that say which model is run and how it is cut; shared by the commands that need
both.
"""

import inspect
from collections.abc import Callable
from enum import StrEnum
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from parallel.errors import ConfigError

if TYPE_CHECKING:
    from runner.config.load import LoadedConfig
    from runner.job import Job


class NetworkGuard(StrEnum):
    """What becomes of Python's connections to other hosts."""

    OFF = "off"
    WARN = "warn"
    STRICT = "strict"


class OnMismatch(StrEnum):
    """What to do with a bundle whose artefacts cannot run on this host."""

    FAIL = "fail"
    REBUILD = "rebuild"
    EAGER = "eager"


def _model_options(
    *,
    config: Annotated[
        Path | None, typer.Option("--config", metavar="PLAN.YAML", help="Configuration file.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", metavar="PATH", help="Local model folder or file.")
    ] = None,
    tensor_parallel_size: Annotated[
        int | None,
        typer.Option("--tensor-parallel-size", "-tp", help="Ranks that share each layer."),
    ] = None,
    pipeline_parallel_size: Annotated[
        int | None, typer.Option("--pipeline-parallel-size", "-pp", help="Stages in a row.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")
    ] = None,
    load_format: Annotated[
        str | None,
        typer.Option("--load-format", help="auto, or dummy: random weights, only config.json."),
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option("--max-model-len", help="Most tokens of prompt and completion.")
    ] = None,
    device: Annotated[str | None, typer.Option("--device", help="auto, cpu or cuda.")] = None,
    devices: Annotated[
        str | None,
        typer.Option(
            "--devices",
            metavar="LIST",
            help="GPUs that the job sees, with commas between: indices or UUIDs; or one MIG id.",
        ),
    ] = None,
    network_guard: Annotated[
        NetworkGuard | None,
        typer.Option(
            "--network-guard",
            help="Connections to other hosts: off, warn (report), strict (refuse).",
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="A.B=VALUE", help="Override a key of the configuration."),
    ] = None,
) -> "LoadedConfig":
    """Merge file, flags and `--set`; see `runner.config.load.load` for what it raises.

    From here on the process is guarded and sees the GPUs that the options say.
    """
    from runner.cli.surroundings import guard, show_devices
    from runner.config.load import load
    from runner.config.settings import Flag

    show_devices(devices)
    given: dict[str, tuple[str, str | int | None]] = {
        "model.path": ("--model", model),
        "parallel.tensor_parallel_size": ("--tensor-parallel-size", tensor_parallel_size),
        "parallel.pipeline_parallel_size": ("--pipeline-parallel-size", pipeline_parallel_size),
        "model.dtype": ("--dtype", dtype),
        "model.load_format": ("--load-format", load_format),
        "model.max_model_len": ("--max-model-len", max_model_len),
        "parallel.device": ("--device", device),
        "security.network_guard": ("--network-guard", network_guard and network_guard.value),
    }
    flags = {key: Flag(name, value) for key, (name, value) in given.items()}
    loaded = load(config, flags=flags, overrides=overrides or ())
    guard(loaded.config)
    return loaded


def _job_options(
    *,
    bundle: Annotated[
        Path | None,
        typer.Option("--bundle", metavar="DIR", help="Run what `shardline compile` made."),
    ] = None,
    accept_parity: Annotated[
        bool,
        typer.Option("--accept-parity", help="Run a bundle that failed its parity check."),
    ] = False,
    on_mismatch: Annotated[
        OnMismatch,
        typer.Option(
            "--on-mismatch", help="If a bundle was compiled for another host: fail, rebuild, eager."
        ),
    ] = OnMismatch.FAIL,
    **model: Any,
) -> "Job":
    """A job from a bundle, or from a model and its options.

    Raises:
        ConfigError: what a bundle was compiled for cannot be changed by an option.
        ParityError: the bundle failed its check.
        IncompatibleError: the bundle was compiled for another host.
    """
    from runner.cli.preflight import check_bundle, check_model
    from runner.cli.surroundings import guard, show_devices
    from runner.jobs import prepare

    if bundle is None and (accept_parity or on_mismatch is not OnMismatch.FAIL):
        raise ConfigError("--accept-parity and --on-mismatch are about a bundle; give --bundle DIR")
    if bundle is None:
        loaded = _model_options(**model)
        check_model(loaded)
        return prepare(loaded.config)
    overrides = list(model.pop("overrides") or ())
    if mode := model.pop("network_guard"):
        overrides.append(f"security.network_guard={mode.value}")
    show_devices(model.pop("devices"))
    if given := [name for name, value in model.items() if value]:
        option = "--" + given[0].replace("_", "-")
        raise ConfigError(
            f"{option} cannot be used with --bundle, which holds a model as it was compiled; "
            "leave it out, or compile again with it"
        )
    from runner.bundled import open_job

    check_bundle(bundle, on_mismatch=on_mismatch.value)
    job = open_job(
        bundle,
        overrides=overrides,
        accept_parity=accept_parity,
        on_mismatch=on_mismatch.value,
    )
    guard(job.config)
    return job


def with_model_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command these options before its own; it gets them as `loaded: LoadedConfig`."""
    return with_options(
        command, name="loaded", make=_model_options, shared=parameters_of(_model_options)
    )


def with_job_options(
    *kinds: Literal["decoder", "graph"],
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The same options and `--bundle`; the command gets `job`, a DecoderJob or a GraphJob.

    Args:
        kinds: of models that the command takes; every one takes language models.

    Raises:
        ConfigError: the model is a tensor model, and the command takes none.
    """
    shared = {**parameters_of(_job_options), **parameters_of(_model_options)}

    def make(**given: Any) -> "Job":
        job = _job_options(**given)
        if job.plan.kind not in kinds:
            raise ConfigError(f"{job.plan.architecture} is a tensor model; use shardline run")
        return job

    return partial(with_options, name="job", make=make, shared=shared)


def parameters_of(options: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The options that a function declares, without what it passes on to another one."""
    signature = inspect.signature(options).parameters
    return {n: p for n, p in signature.items() if p.kind is not inspect.Parameter.VAR_KEYWORD}


def with_options(
    command: Callable[..., None],
    *,
    name: str,
    make: Callable[..., Any],
    shared: dict[str, inspect.Parameter],
) -> Callable[..., None]:
    """Put `shared` before a command's own options, and what `make` makes of them into `name`."""
    own = inspect.signature(command).parameters

    @wraps(command)
    def wrapped(**given: Any) -> None:
        made = make(**{option: given.pop(option) for option in shared})
        command(**{name: made}, **given)

    parameters = [*shared.values(), *(p for option, p in own.items() if option != name)]
    wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {p.name: p.annotation for p in parameters}
    return wrapped
