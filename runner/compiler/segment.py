"""`Segment`: the unit of compilation. The second of the four hinges.

A segment is a pure function of activations and weights at fixed shapes: what a rank computes
between two collectives or attention calls, or any module that `torch.export` takes. Weights are
inputs like activations, so equal segments of different layers, cuts and checkpoints are one
artefact. How an artefact is made of it is `runner.compiler.backend`.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from parallel.errors import UnsupportedSegmentError


@dataclass(frozen=True)
class TensorSpec:
    """A tensor without its values; always contiguous."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "TensorSpec":
        return cls(tuple(tensor.shape), tensor.dtype)

    def empty(self, device: torch.device | str) -> torch.Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device=device)

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)}"


@dataclass(frozen=True)
class Segment:
    """A pure function at fixed shapes.

    Attributes:
        kind: what it computes, such as "mlp"; for people, not part of its identity.
        module: called with the activations alone; its parameters and buffers are the weights,
            which may be on the meta device. It returns a tensor or a tuple of tensors.
        activations: what it is called with.
    """

    kind: str
    module: nn.Module
    activations: tuple[TensorSpec, ...]

    @property
    def weights(self) -> dict[str, TensorSpec]:
        """Its parameters and buffers by name, in the order in which they are passed."""
        return {name: TensorSpec.of(tensor) for name, tensor in named_tensors(self.module)}

    @property
    def num_rows(self) -> int:
        """Of its first activation; 0 where it has none, or that is a single number."""
        shape = self.activations[0].shape if self.activations else ()
        return shape[0] if shape else 0

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What its compiled form is called with: the activations, then the weights."""
        return (*self.activations, *self.weights.values())

    def export(self, device: torch.device | str) -> torch.export.ExportedProgram:
        """The graph of the segment on `device`, with every weight as an input and no state.

        Takes no memory: the inputs are traced as fake tensors.

        Raises:
            UnsupportedSegmentError: PyTorch cannot trace the module.
        """
        try:
            with FakeTensorMode(), torch.no_grad():
                inputs = tuple(spec.empty(device) for spec in self.inputs)
                return torch.export.export(self.function(), inputs, strict=False)
        except Exception as error:
            raise UnsupportedSegmentError(
                f"segment {self.kind} cannot be exported ({type(error).__name__}: {error}); run "
                "the model without compiling it"
            ) from error

    def function(self) -> nn.Module:
        """The segment as PyTorch runs it: inputs in, a tuple of outputs out; holds no weights."""
        return _Function(self.module, len(self.activations))

    def digest(self, program: torch.export.ExportedProgram) -> str:
        """sha256 of what the function is: its graph with all arguments, and its inputs' shapes
        and dtypes. Equal for equal segments in every process, whatever their weights hold.
        """
        inputs = [str(spec) for spec in self.inputs]
        text = json.dumps({"graph": program.graph_module.code.strip(), "inputs": inputs})
        digest = hashlib.sha256(text.encode())
        for name, constant in sorted(program.constants.items()):
            digest.update(f"{name} {constant}".encode())
            if isinstance(constant, torch.Tensor):
                digest.update(constant.contiguous().view(torch.uint8).cpu().numpy().tobytes())
        return digest.hexdigest()


def save_program(program: torch.export.ExportedProgram, file: Path) -> None:
    """Write an exported segment, for another process to `torch.export.load`."""
    # Its example inputs are fake tensors, which only an unsafe load would read back.
    examples, program.example_inputs = program.example_inputs, None
    try:
        torch.export.save(program, file)
    finally:
        program.example_inputs = examples


def named_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """What a module holds: its parameters, then its buffers."""
    yield from module.named_parameters()
    yield from module.named_buffers()


class _Function(nn.Module):
    """A module as a function of activations and weights; it owns no parameters itself."""

    def __init__(self, module: nn.Module, num_activations: int) -> None:
        super().__init__()
        # In a tuple, or torch would register it and export its parameters as state.
        self._hidden = (module,)
        self._names = tuple(name for name, _ in named_tensors(module))
        self._num_activations = num_activations

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        weights = dict(zip(self._names, inputs[self._num_activations :], strict=True))
        output = torch.func.functional_call(
            self._hidden[0], weights, inputs[: self._num_activations]
        )
        return output if isinstance(output, tuple) else (output,)
