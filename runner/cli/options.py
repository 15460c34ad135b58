"""The options that say which model is run and how it is cut; shared by the commands that need
both.
"""

import inspect
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from runner.config.load import LoadedConfig


def _model_options(
    *,
    config: Annotated[
        Path | None, typer.Option("--config", metavar="PLAN.YAML", help="Configuration file.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", metavar="DIR", help="Local model folder.")
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
    max_model_len: Annotated[
        int | None, typer.Option("--max-model-len", help="Most tokens of prompt and completion.")
    ] = None,
    device: Annotated[str | None, typer.Option("--device", help="auto, cpu or cuda.")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="A.B=VALUE", help="Override a key of the configuration."),
    ] = None,
) -> "LoadedConfig":
    """Merge file, flags and `--set`; see `runner.config.load.load` for what it raises."""
    from runner.config.load import load
    from runner.config.settings import Flag

    given: dict[str, tuple[str, str | int | None]] = {
        "model.path": ("--model", model),
        "parallel.tensor_parallel_size": ("--tensor-parallel-size", tensor_parallel_size),
        "parallel.pipeline_parallel_size": ("--pipeline-parallel-size", pipeline_parallel_size),
        "model.dtype": ("--dtype", dtype),
        "model.max_model_len": ("--max-model-len", max_model_len),
        "parallel.device": ("--device", device),
    }
    flags = {key: Flag(name, value) for key, (name, value) in given.items()}
    return load(config, flags=flags, overrides=overrides or ())


def with_model_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command these options before its own; it gets them as `loaded: LoadedConfig`."""
    shared = inspect.signature(_model_options).parameters
    own = inspect.signature(command).parameters

    @wraps(command)
    def wrapped(**given: Any) -> None:
        loaded = _model_options(**{name: given.pop(name) for name in shared})
        command(loaded=loaded, **given)

    parameters = [*shared.values(), *(p for name, p in own.items() if name != "loaded")]
    wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {p.name: p.annotation for p in parameters}
    return wrapped
