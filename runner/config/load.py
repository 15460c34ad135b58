"""From a file, flags and `--set` to a `RunnerConfig`, with the origin of each value.

What the keys are is said in `schema`; what the model's directory holds is `runner.models`'s part.
"""

import copy
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel, ValidationError

from runner.config.document import Document, read
from runner.config.fields import field_at
from runner.config.messages import explain
from runner.config.problems import Loc, Place, Problem, config_error, dotted, shown
from runner.config.schema import RunnerConfig
from runner.config.settings import Flag, Settings

DEFAULT = "default"

_NUM_STAGES = "parallel.pipeline_parallel_size"
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?|[a-z]+://.*")


@dataclass(frozen=True)
class LoadedConfig:
    """A valid configuration, and where each of its values came from.

    Attributes:
        config: the values in effect.
        origins: by dotted key, in the order of the schema: `default`, `plan.yaml:12:5`, `--set`,
            the name of a flag, or the key from which the value follows.
    """

    config: RunnerConfig
    origins: dict[str, str]


def load(
    path: Path | None,
    *,
    base: Mapping[str, Any] = MappingProxyType({"version": 1}),
    flags: Mapping[str, Flag] = MappingProxyType({}),
    overrides: Sequence[str] = (),
) -> LoadedConfig:
    """Read, merge and validate: `--set` over flags over the file over defaults.

    Args:
        path: the YAML file; None for flags and overrides alone.
        base: stands for the file where there is none; the values of a bundle, for example.
        flags: dotted key -> the flag that stands for it.
        overrides: the `a.b=value` strings of `--set`; of two for one key the later wins.

    Raises:
        ConfigError: lists every problem, a line each, with file, line and column, or the flag.
    """
    settings = Settings(read(path) if path else Document("", copy.deepcopy(dict(base))))
    for key, flag in flags.items():
        settings.put_flag(key, flag)
    for override in overrides:
        settings.put_override(override)
    config, problems = _validate(settings, Place(str(path)) if path else None)
    problems += [*settings.problems, *_path_problems(settings)]
    if config is not None:
        problems += _ignored_flags(config, settings, flags)
    if problems or config is None:
        raise config_error(problems)
    origins = dict(_origins(config, (), settings))
    if origins[_NUM_STAGES] == DEFAULT:
        if config.parallel.stages:
            origins[_NUM_STAGES] = "parallel.stages"
        elif config.parallel.split_points:
            origins[_NUM_STAGES] = "parallel.split_points"
    return LoadedConfig(config, origins)


def _validate(settings: Settings, file: Place | None) -> tuple[RunnerConfig | None, list[Problem]]:
    try:
        return RunnerConfig.model_validate(settings.data), []
    except ValidationError as error:
        problems = []
        for loc, message in explain(error, RunnerConfig):
            problems.append(Problem(_place(settings, loc) or file, loc, message))
        return None, problems


def _place(settings: Settings, loc: Loc) -> Place | None:
    """The place of a value, of an unknown key, or for a missing one of the section around it."""
    unknown = bool(loc) and isinstance(loc[-1], str) and field_at(RunnerConfig, loc) is None
    exact = (settings.keys if unknown else settings.values).get(loc)
    ways = (loc[:length] for length in range(len(loc) - 1, 0, -1))
    around = (settings.keys.get(way) or settings.values.get(way) for way in ways)
    return exact or next((place for place in around if place), None)


def _path_problems(settings: Settings) -> Iterator[Problem]:
    """The model must be there; a hub id is the usual reason why it is not."""
    section = settings.data.get("model")
    path = section.get("path") if isinstance(section, dict) else None
    if not isinstance(section, dict) or not isinstance(path, str) or not path:
        return
    is_file = _is_file(section, path)
    # A factory with random weights reads nothing; its path is what it is called by.
    if section.get("factory") is not None and section.get("load_format") == "dummy":
        is_right = os.path.exists(path)
    else:
        is_right = os.path.isfile(path) if is_file else os.path.isdir(path)
    if is_right:
        return
    loc = ("model", "path")
    told = shown(path, limit=4096)  # Its end is what tells paths apart.
    if not os.path.isabs(path) and not os.path.exists(path):
        told += f" in {os.getcwd()}"
    if is_file:
        problem = "is not a file" if os.path.exists(path) else "is not there"
        message = f"{told} {problem}; give the file that holds the model or its weights"
    elif os.path.exists(path):
        message = f"{told} is not a directory; give the directory that holds the model"
    elif _HUB_ID.fullmatch(path):
        message = (
            f"no directory {told}; if this is a hub id: nothing is ever fetched, so "
            "download the model and give its local directory"
        )
    else:
        message = f"no directory {told}; give the local directory that holds the model"
    yield Problem(settings.values.get(loc), loc, message)


def _is_file(section: dict[str, Any], path: str) -> bool:
    """Whether the model is one file; a language model and a factory's own weights are none."""
    form = section.get("format", "auto")
    is_tensor_model = form in ("factory", "pt2", "onnx") or (
        form == "auto" and (section.get("factory") is not None or path.endswith((".onnx", ".pt2")))
    )
    return is_tensor_model and section.get("load_format") != "dummy"


def _ignored_flags(
    config: RunnerConfig, settings: Settings, flags: Mapping[str, Flag]
) -> Iterator[Problem]:
    """A flag for all stages does nothing to a stage whose size the file gives: refuse it."""
    loc = ("parallel", "tensor_parallel_size")
    flag, place = flags.get(dotted(loc)), settings.values.get(loc)
    if flag is None or place != Place(flag.name):
        return
    asked = config.parallel.tensor_parallel_size
    for index, stage in enumerate(config.parallel.stages or []):
        own = ("parallel", "stages", index, "tensor_parallel_size")
        written, size = settings.values.get(own), stage.tensor_parallel_size
        if written is not None and written.line and size not in (None, asked):
            message = f"{asked} contradicts {dotted(own)}={size} ({written}); drop the flag or add"
            yield Problem(place, loc, f"{message} --set {dotted(own)}={asked}")


def _origins(section: BaseModel, above: Loc, settings: Settings) -> Iterator[tuple[str, str]]:
    for name in type(section).model_fields:
        yield from _origins_of(getattr(section, name), (*above, name), settings)


def _origins_of(value: Any, loc: Loc, settings: Settings) -> Iterator[tuple[str, str]]:
    if isinstance(value, BaseModel):
        yield from _origins(value, loc, settings)
    elif isinstance(value, list) and any(isinstance(item, BaseModel) for item in value):
        for index, item in enumerate(value):
            yield from _origins_of(item, (*loc, index), settings)
    elif isinstance(value, dict) and value:
        for name in value:
            entry = (*loc, name)
            yield dotted(entry), str(settings.values.get(entry, DEFAULT))
    else:
        yield dotted(loc), str(settings.values.get(loc, DEFAULT))
