"""Export a module at fixed input shapes with `torch.export`, or say in one line why it cannot be.

What the exported program must not do is `parallel.graph_refuse`.
"""

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_tb

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from parallel.errors import ConfigError
from parallel.graph_stage import Value


def export(module: nn.Module, inputs: Sequence[Value]) -> ExportedProgram:
    """`module` in evaluation mode as a functional graph; takes no memory for activations.

    Its weights may be real, mapped from a file or on the meta device. Collectives may name a
    process group that does not exist.

    Raises:
        ConfigError: torch cannot trace it.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        tensors = tuple(torch.empty(v.shape, dtype=v.torch_dtype) for v in inputs)
    # Not under the mode itself, or constants made by the model's code would lose their values.
    try:
        with _evaluating(module), _on_the_cpu(module, mode), _quiet(), torch.no_grad():
            program = torch.export.export(module, tensors, strict=False)
            plain: ExportedProgram = program.run_decompositions({})
            return plain
    except Exception as error:
        given = ", ".join(map(str, inputs)) or "none"
        raise ConfigError(
            f"the model cannot be traced with inputs {given}: {_cause(error)}"
        ) from error


def _cause(error: Exception) -> str:
    """What went wrong, and where in the model's code."""
    where = _place(error)
    if isinstance(error, GuardOnDataDependentSymNode):
        return f"what it computes depends on the values of its inputs{where}; use torch.where"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}{where}"


def _place(error: Exception) -> str:
    """The innermost line outside torch and Python's own library."""
    not_theirs = (str(Path(torch.__file__).parent), contextlib.__file__, "<")
    for frame, line in reversed(list(walk_tb(error.__traceback__))):
        code = frame.f_code
        if not code.co_filename.startswith((*not_theirs, __file__)):
            return f" (in {code.co_name}, {Path(code.co_filename).name} line {line})"
    return ""


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    # Flags rather than `eval()`, which the module of an exported program refuses.
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


@contextmanager
def _on_the_cpu(module: nn.Module, mode: FakeTensorMode) -> Iterator[None]:
    """Meanwhile weights that are elsewhere, such as the meta device, are fake tensors there."""
    elsewhere = [
        (owner, name, tensor)
        for owner in module.modules()
        for name, tensor in (
            *owner.named_parameters(recurse=False, remove_duplicate=False),
            *owner.named_buffers(recurse=False, remove_duplicate=False),
        )
        if tensor.device.type != "cpu"
    ]
    fakes = {id(tensor): _fake(tensor, mode) for _, _, tensor in elsewhere}
    try:
        for owner, name, tensor in elsewhere:
            setattr(owner, name, fakes[id(tensor)])
        yield
    finally:
        for owner, name, tensor in elsewhere:
            setattr(owner, name, tensor)


def _fake(tensor: torch.Tensor, mode: FakeTensorMode) -> torch.Tensor:
    with mode:
        fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    return nn.Parameter(fake, requires_grad=False) if isinstance(tensor, nn.Parameter) else fake


@contextmanager
def _quiet() -> Iterator[None]:
    """What torch logs about a failure is in our one line; its own deprecations concern no user."""
    names = ("torch._subclasses.fake_tensor", "torch.fx.experimental.symbolic_shapes")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*treespec, LeafSpec", category=FutureWarning)
            # A recurrent module's own list of its parameters, which torch mistakes for state.
            warnings.filterwarnings("ignore", r".*self\.[\w.]*_flat_weights\[", UserWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
