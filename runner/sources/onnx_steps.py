"""The steps of an ONNX graph: operators on tensors, and shape computations on the host.

Not here: their order.
"""

import re
from collections.abc import Container, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from runner.sources.onnx_branches import operand_names, subgraphs
from runner.sources.onnx_install import import_onnx
from runner.sources.onnx_library import LibraryOperator
from runner.sources.onnx_operator import Converter, Operand, UnsupportedError

if TYPE_CHECKING:
    import onnx


_NOT_IN_NAMES = re.compile(r"\W+")


class Constants(nn.Module):
    """What the graph has stored: arrays, and buffers of those that operators take as tensors."""

    def __init__(
        self,
        arrays: Mapping[str, np.ndarray],
        *,
        as_tensors: Iterable[str],
        as_arrays: Iterable[str],
    ) -> None:
        super().__init__()
        self._arrays = {name: arrays[name] for name in as_arrays if name in arrays}
        self._buffer_names: dict[str, str] = {}
        for name in dict.fromkeys(as_tensors):
            if name in arrays:
                free = _NOT_IN_NAMES.sub("_", name)
                while hasattr(self, free):
                    free += "_"
                self._buffer_names[name] = free
                self.register_buffer(free, to_tensor(arrays[name], name))

    def get(self, name: str) -> Operand:
        """A tensor, or a numpy array if no operator takes it as a tensor."""
        if name in self._buffer_names:
            return getattr(self, self._buffer_names[name])
        return self._arrays[name]

    def get_array(self, name: str) -> np.ndarray:
        """For a shape, axes or the like."""
        return self._arrays[name]


class Step(nn.Module):
    """One node.

    Attributes:
        name: unique in the graph.
        inputs: names of its operands, those of graphs inside it too; "" for one that is left out.
        outputs: names of what it computes.
        array_positions: where an operand is wanted as a numpy array.
    """

    def __init__(self, name: str, node: "onnx.NodeProto") -> None:
        super().__init__()
        self.name = name
        self.inputs = tuple(operand_names(node))
        self.outputs = tuple(node.output)
        self.array_positions: Container[int] = range(len(self.inputs))


class HostStep(Step):
    """A shape computation, by ONNX's own reference, on numpy arrays."""

    def __init__(self, name: str, node: "onnx.NodeProto", opsets: Mapping[str, int]) -> None:
        super().__init__(name, node)
        if _lacks_condition(node):
            # The reference takes it for false, and loops never.
            raise UnsupportedError("a condition that is left out")
        onnx = import_onnx()
        from onnx.reference import ReferenceEvaluator

        graph = onnx.helper.make_graph(
            [node],
            node.op_type,
            [onnx.ValueInfoProto(name=name) for name in dict.fromkeys(self.inputs) if name],
            [onnx.ValueInfoProto(name=name) for name in node.output],
        )
        try:
            self._evaluator = ReferenceEvaluator(graph, opsets=dict(opsets))
        except (NotImplementedError, RuntimeError, KeyError) as error:
            raise UnsupportedError("constant operands") from error

    def forward(self, *operands: Operand) -> list[np.ndarray]:
        given = {name: x for name, x in zip(self.inputs, operands, strict=True) if name}
        return [np.asarray(value) for value in self._evaluator.run(None, given)]


def _lacks_condition(node: "onnx.NodeProto") -> bool:
    """Whether it, or one inside it, is a Loop without."""
    inner = (one for graph in subgraphs(node) for one in graph.node)
    return (node.op_type == "Loop" and not node.input[1]) or any(map(_lacks_condition, inner))


class ShapeStep(Step):
    """The shape of a tensor, or its number of elements."""

    def __init__(self, name: str, node: "onnx.NodeProto", _: Mapping[str, int]) -> None:
        super().__init__(name, node)
        attributes = attributes_of(node)
        self._is_size = node.op_type == "Size"
        self._part = slice(attributes.get("start", 0), attributes.get("end"))

    def forward(self, x: Operand) -> list[np.ndarray]:
        shape = np.array(list(x.shape), dtype=np.int64)
        return [np.array(shape.prod()) if self._is_size else shape[self._part]]


class OperatorStep(Step):
    """A node that computes tensors."""

    def __init__(
        self, name: str, node: "onnx.NodeProto", operator: Converter | LibraryOperator
    ) -> None:
        super().__init__(name, node)
        self._attributes = attributes_of(node)
        if isinstance(operator, LibraryOperator):
            self.inputs = operator.inputs
            self.module: nn.Module | None = operator.module
            self._run, self.array_positions = operator.run, ()
            return
        self.module = None
        operator.check(self._attributes)
        wanted = len([output for output in node.output if output])
        if operator.num_outputs is not None and wanted > operator.num_outputs:
            raise UnsupportedError(f"{wanted} outputs")
        self._run, self.array_positions = operator.run, operator.host
        if operator.num_outputs is None:
            self._attributes["num_outputs"] = wanted

    def forward(self, *operands: Operand) -> tuple[torch.Tensor, ...]:
        like = next(x for x in operands if isinstance(x, torch.Tensor))
        given = [
            x if at in self.array_positions else to_tensor(x, name, like.device)
            for at, (x, name) in enumerate(zip(operands, self.inputs, strict=True))
        ]
        found = self._run(self._attributes, *given)
        return found if isinstance(found, tuple) else (found,)


def to_tensor(value: Operand, name: str, device: torch.device | str = "cpu") -> Operand:
    """An array as a tensor on `device`; a tensor and None as they are.

    Raises:
        UnsupportedError: an array of a type that torch does not take from numpy.
    """
    if value is None or isinstance(value, torch.Tensor):
        return value
    array = np.array(value)
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).to(device)
    try:
        return torch.from_numpy(array).to(device)
    except TypeError:
        raise UnsupportedError(
            f"tensor {name} is of type {array.dtype.name}, which we do not take; store it as "
            "float32, float16 or bfloat16"
        ) from None


def attributes_of(node: "onnx.NodeProto") -> dict[str, Any]:
    """Name -> a number, text, a list of numbers, or a protobuf message."""
    value_of = import_onnx().helper.get_attribute_value
    found = {attribute.name: value_of(attribute) for attribute in node.attribute}
    return {
        name: value.decode() if isinstance(value, bytes) else value for name, value in found.items()
    }
