"""`TensorModel`: a tensor model opened, whatever it comes from. One file a source does the work."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from parallel.errors import ConfigError
from runner.config.schema import RunnerConfig


@dataclass(frozen=True)
class TensorModel:
    """A module to be divided.

    Attributes:
        module: in evaluation mode, on the CPU, its floating-point tensors in `dtype`.
        architecture: what to call it.
        dtype: such as "float32".
        files: what it was read from: weights, and of code the file of its factory.
    """

    module: nn.Module
    architecture: str
    dtype: str
    files: tuple[Path, ...]

    @classmethod
    def open(cls, config: RunnerConfig) -> "TensorModel":
        """Open what `model` of a configuration names.

        Raises:
            ConfigError: a factory that is not allowed or fails, a graph that cannot be converted.
            IntegrityError: a file that is corrupt, would have to be unpickled, or does not match.
            PreflightError: a package that reading it needs is not installed.
        """
        path, found = Path(config.model.path), config.model.resolved_format
        files: tuple[Path, ...]
        if found == "factory":
            module, files = _from_factory(config)
            name = str(config.model.factory)
        elif found == "pt2":
            from runner.sources.pt2 import open_pt2

            module, name, files = open_pt2(path), path.name, (path,)
        else:
            from runner.sources.onnx_file import files_of
            from runner.sources.onnx_graph import open_onnx

            module, name, files = open_onnx(path), path.name, files_of(path)
        dtype = _dtype_of(module) if config.model.dtype == "auto" else config.model.dtype
        return cls(_converted(module, dtype), name, dtype, files)


def _from_factory(config: RunnerConfig) -> tuple[nn.Module, tuple[Path, ...]]:
    from runner.sources.factory import code_file, open_factory

    model = config.model
    weights = None if model.load_format == "dummy" else Path(model.path)
    reference = str(model.factory)
    module = open_factory(
        reference,
        arguments=model.factory_args,
        weights=weights,
        allowed=config.security.factories,
        search_path=Path(model.factory_path) if model.factory_path else None,
    )
    return module, tuple(file for file in (weights, code_file(reference)) if file)


def _dtype_of(module: nn.Module) -> str:
    """That of its floating-point tensors, which must all have one."""
    tensors = [*module.parameters(), *module.buffers()]
    found = {str(t.dtype).removeprefix("torch.") for t in tensors if t.is_floating_point()}
    if len(found) > 1:
        raise ConfigError(
            f"model.dtype: auto, but the weights are of {', '.join(sorted(found))}; name one dtype"
        )
    return found.pop() if found else "float32"


def _converted(module: nn.Module, dtype: str) -> nn.Module:
    """The same module; tensors of another floating-point dtype are converted, and so read."""
    wanted = getattr(torch, dtype)
    tensors = [*module.parameters(), *module.buffers()]
    if any(t.is_floating_point() and t.dtype != wanted for t in tensors):
        module.to(wanted)
    return module
