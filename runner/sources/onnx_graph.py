"""An ONNX graph as a module: operators in the graph's order, each a submodule.

What is computed from shapes alone stays in numpy while the module runs, so that a trace at fixed
shapes holds no shape computation and nothing depends on data. Not here: what an operator computes.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from parallel.errors import ConfigError
from runner.sources.onnx_branches import operand_names, taken_branch
from runner.sources.onnx_converters import find_converter
from runner.sources.onnx_file import input_names, output_names, read_onnx
from runner.sources.onnx_install import import_onnx
from runner.sources.onnx_library import find_library_operator
from runner.sources.onnx_operator import Operand, UnsupportedError
from runner.sources.onnx_steps import (
    Constants,
    HostStep,
    OperatorStep,
    ShapeStep,
    Step,
    to_tensor,
)

if TYPE_CHECKING:
    import onnx

__all__ = ["OnnxModule", "input_names", "open_onnx", "output_names"]

_ANY_NAME = re.compile(r"\W+")
_SHAPES = ("Shape", "Size")
_RANDOM = ("Bernoulli", "Multinomial", "RandomNormal", "RandomUniform")


class OnnxModule(nn.Module):
    """Takes the graph's inputs in its order; returns its output, or a tuple of several.

    Attributes:
        input_names: the graph's own names.
        output_names: the graph's own names.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        constants: Constants,
        *,
        input_names: Sequence[str],
        output_names: Sequence[str],
    ) -> None:
        super().__init__()
        self.constants: Constants
        self.input_names: tuple[str, ...]
        self.output_names: tuple[str, ...]
        self.constants = constants
        self.steps = nn.ModuleDict({step.name: step for step in steps})
        self._steps = tuple(steps)
        self.input_names = tuple(input_names)
        self.output_names = tuple(output_names)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Args: inputs: each of a fixed shape. Raises: ConfigError: not as many as the graph's."""
        if len(inputs) != len(self.input_names):
            raise ConfigError(
                f"the ONNX graph takes {len(self.input_names)} inputs "
                f"({', '.join(self.input_names)}), {len(inputs)} were given"
            )
        values: dict[str, Operand] = dict(zip(self.input_names, inputs, strict=True))
        for step in self._steps:
            operands = [
                self._operand(values, name, as_array=position in step.array_positions)
                for position, name in enumerate(step.inputs)
            ]
            values |= zip(step.outputs, step(*operands), strict=False)
        outputs = [to_tensor(self._operand(values, name), name) for name in self.output_names]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def _operand(self, values: dict[str, Operand], name: str, *, as_array: bool = False) -> Operand:
        if not name:
            return None
        if name in values:
            return values[name]
        return self.constants.get_array(name) if as_array else self.constants.get(name)


def open_onnx(path: Path) -> nn.Module:
    """The graph as a module in eval mode on the CPU, its weights as buffers.

    Raises:
        ConfigError: operators that have no converter; names all of them. Or a tensor of a type
            that torch does not take.
        IntegrityError: the file is absent, truncated, or has weights outside its folder.
        PreflightError: onnx or onnx2torch is not installed.
    """
    model = read_onnx(path)
    module = _Builder(path, model).build()
    return module.eval().requires_grad_(False)


def _is_if(node: "onnx.NodeProto") -> bool:
    return node.op_type == "If" and not node.domain


class _Builder:
    """Turns nodes into steps, and collects what stands in the way."""

    def __init__(self, path: Path, model: "onnx.ModelProto") -> None:
        self._path = path
        self._graph = model.graph
        self._opsets = {entry.domain or "": entry.version for entry in model.opset_import}
        to_array = import_onnx().numpy_helper.to_array
        self._constants: dict[str, np.ndarray] = {
            tensor.name: to_array(tensor) for tensor in model.graph.initializer
        }
        self._host: set[str] = set()
        """Values that follow from shapes alone, known when the module runs."""
        self._obstacles: Counter[str] = Counter()
        self._names: Counter[str] = Counter()

    def build(self) -> OnnxModule:
        inputs = [v.name for v in self._graph.input if v.name not in self._constants]
        outputs = [value.name for value in self._graph.output]
        steps = list(self._steps(self._graph.node))
        if self._obstacles:
            raise self._refusal()
        operands = [
            (name, position in step.array_positions)
            for step in steps
            for position, name in enumerate(step.inputs)
        ]
        try:
            constants = Constants(
                self._constants,
                as_tensors=[*(name for name, as_array in operands if not as_array), *outputs],
                as_arrays=[name for name, as_array in operands if as_array],
            )
        except UnsupportedError as error:
            raise ConfigError(f"{self._path}: {error}") from None
        return OnnxModule(steps, constants, input_names=inputs, output_names=outputs)

    def _refusal(self) -> ConfigError:
        listed = ", ".join(f"{name} ({count})" for name, count in sorted(self._obstacles.items()))
        return ConfigError(
            f"{self._path}: no converter for {listed}; export the model without these operators, "
            "for example with another opset, or give it as a .pt2 or by a factory"
        )

    def _steps(self, nodes: "Iterable[onnx.NodeProto]") -> Iterator[Step]:
        for node in nodes:
            if _is_if(node) and node.input[0] in self._constants:
                condition = bool(self._constants[node.input[0]].item())
                yield from self._steps(taken_branch(node, condition=condition))
            elif (step := self._step(node)) is not None:
                yield step

    def _step(self, node: "onnx.NodeProto") -> Step | None:
        """None: the node is computed now, or cannot be."""
        given = [name for name in operand_names(node) if name]
        try:
            if node.op_type.startswith(_RANDOM):
                raise UnsupportedError
            if all(name in self._constants for name in given):
                self._fold(node)
                return None
            host = self._constants.keys() | self._host
            if node.op_type in _SHAPES or all(name in host for name in given):
                self._host.update(node.output)
                kind = ShapeStep if node.op_type in _SHAPES else HostStep
                return kind(self._name(node), node, self._opsets)
            return self._operator(node)
        except UnsupportedError as error:
            reason = f" with {error}" if str(error) else ""
            self._obstacles[f"{node.domain or 'ai.onnx'}.{node.op_type}{reason}"] += 1
            return None

    def _fold(self, node: "onnx.NodeProto") -> None:
        step = HostStep("", node, self._opsets)
        values = step(*(self._constants.get(name) for name in step.inputs))
        self._constants |= zip(step.outputs, values, strict=False)

    def _operator(self, node: "onnx.NodeProto") -> Step:
        if _is_if(node):
            raise UnsupportedError(
                f"a condition that is not constant, node {node.name or node.output[0]} (simplify "
                "the graph at fixed input shapes, for example by onnxsim, or export it with "
                "constant conditions)"
            )
        version = self._opsets.get(node.domain, 1)
        converter = None if node.domain else find_converter(node.op_type, version)
        if converter is None:
            found = find_library_operator(node, version, self._constants)
            return OperatorStep(self._name(node), node, found)
        step = OperatorStep(self._name(node), node, converter)
        for position, name in enumerate(node.input):
            known = not name or name in self._constants or name in self._host
            if position in converter.host and not known:
                raise UnsupportedError(f"operand {position} computed from data")
        return step

    def _name(self, node: "onnx.NodeProto") -> str:
        name = _ANY_NAME.sub("_", node.name or node.op_type).strip("_") or node.op_type
        if hasattr(nn.ModuleDict, name):
            name += "_"
        self._names[name] += 1
        count = self._names[name]
        return name if count == 1 else f"{name}__{count}"
