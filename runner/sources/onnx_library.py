"""Operators that onnx2torch computes, found in its table.

Not here: those that we compute ourselves.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from runner.sources.onnx_install import (
    import_onnx,
    import_onnx2torch,
    operators_without_torchvision,
)
from runner.sources.onnx_operator import Attributes, Operand, UnsupportedError

if TYPE_CHECKING:
    import onnx

_ONLY_DTYPES_ADDED = {
    "Abs", "Acos", "Add", "And", "ArgMax", "ArgMin", "Asin", "Atan", "Ceil", "Concat", "Cos",
    "DepthToSpace", "Div", "Dropout", "Einsum", "Elu", "Equal", "Erf", "Exp", "Floor",
    "GatherElements", "GatherND", "Gemm", "Greater", "GreaterOrEqual", "HardSwish", "Identity",
    "IsNaN", "LeakyRelu", "Less", "LessOrEqual", "Log", "LogSoftmax", "MatMul", "Max", "Min", "Mod",
    "Mul", "Neg", "Not", "Or", "PRelu", "Range", "Reciprocal", "Relu", "Round", "Selu", "Sigmoid",
    "Sign", "Sin", "Softplus", "Softsign", "Sqrt", "Sub", "Sum", "Tan", "Tanh", "TopK", "Transpose",
    "Where", "Xor",
}  # fmt: skip
"""Operators whose versions after those in onnx2torch's table accept more dtypes and are else the
same, so that its newest converter serves them."""

_NUMPY_KINDS = "biufc"
"""Of arrays that onnx2torch can take in; bfloat16 is none of numpy's own types."""


@dataclass(frozen=True)
class LibraryOperator:
    """A module of onnx2torch.

    Attributes:
        inputs: names of the operands that it still takes; others are in it.
    """

    module: nn.Module
    inputs: tuple[str, ...]

    def run(self, _: Attributes, *operands: Operand) -> Any:
        """The attributes are in the module."""
        found = self.module(*operands)
        return tuple(found) if isinstance(found, list) else found


def find_library_operator(
    node: "onnx.NodeProto",
    version: int,
    constants: Mapping[str, np.ndarray],
) -> LibraryOperator:
    """Build onnx2torch's module for a node.

    Args:
        version: of the node's operator set.
        constants: values that are known; the module may take them in.

    Raises:
        UnsupportedError: it has no converter, or its converter refuses the node.
    """
    library = import_onnx2torch()
    converter = _find_converter(node, version)
    onnx = import_onnx()
    alone = onnx.GraphProto(name=node.op_type)
    alone.node.append(node)
    alone.input.extend(onnx.ValueInfoProto(name=name) for name in node.input if name)
    known = {
        name: constants[name]
        for name in dict.fromkeys(node.input)
        if name in constants and constants[name].dtype.kind in _NUMPY_KINDS
    }
    alone.initializer.extend(onnx.numpy_helper.from_array(a, name=n) for n, a in known.items())
    try:
        module, mapping = converter(
            library.onnx_node.OnnxNode(node, unique_name=node.op_type),
            library.onnx_graph.OnnxGraph(alone),
        )
    except (NotImplementedError, KeyError, ValueError) as error:
        raise UnsupportedError(str(error).strip("'\"") or type(error).__name__) from error
    return LibraryOperator(module, tuple(mapping.inputs))


def _find_converter(node: "onnx.NodeProto", version: int) -> Any:
    registry = import_onnx2torch().node_converters.registry
    if not node.domain and node.op_type in operators_without_torchvision():
        raise UnsupportedError("torchvision, which is not installed")
    try:
        return registry.get_converter(node.op_type, version, node.domain)
    except NotImplementedError:
        pass
    if node.domain or node.op_type not in _ONLY_DTYPES_ADDED:
        raise UnsupportedError
    for older in range(version, 0, -1):
        try:
            return registry.get_converter(node.op_type, older, node.domain)
        except NotImplementedError:
            continue
    raise UnsupportedError
