"""Kernels of 1 x 1 in the layout in which TensorRT-RTX reads them.

Weights are inputs of an engine, and RTX would copy every such kernel into that layout in every run,
which of a small batch takes a tenth to a fifth of the time (docs/measurements.md). With its
channels last a kernel of 1 x 1 is the same numbers in the same order: the engine takes it in that
shape, and is given the same memory.
"""

import copy
from math import prod

import torch
from torch import nn

from runner.compiler.segment import TensorSpec
from runner.compiler.tensorrt_convolutions import CONVOLUTIONS
from runner.compiler.tensorrt_install import Flavour


def turn_kernels(
    program: torch.export.ExportedProgram, flavour: Flavour
) -> torch.export.ExportedProgram:
    """The program with such kernels as (columns, 1, 1, channels).

    Itself where there are none, and where it holds constants, as those that a `forward` makes.
    """
    signature = program.graph_signature
    if flavour != "rtx" or len(signature.input_specs) > len(signature.user_inputs):
        return program
    if not any(map(_is_kernel_of_1, program.graph.nodes)):
        return program
    module = copy.deepcopy(program.graph_module)
    places = [node for node in module.graph.nodes if node.op == "placeholder"]
    inputs = []
    for place in places:
        spec = TensorSpec.of(place.meta["val"])
        if _is_kernel_of_1(place):
            spec = _turn(module.graph, place, spec, places[-1])
        inputs.append(spec)
    module.graph.lint()
    module.recompile()
    fake = places[0].meta["val"]
    with fake.fake_mode, torch.no_grad():
        examples = tuple(spec.empty(fake.device) for spec in inputs)
        return torch.export.export(_Flat(module), examples, strict=False)


def _turn(
    graph: torch.fx.Graph, kernel: torch.fx.Node, spec: TensorSpec, last: torch.fx.Node
) -> TensorSpec:
    """Take it with its channels last, and turn it back after the last input."""
    columns, channels, *places = spec.shape
    dims = [0, len(places) + 1, *range(1, len(places) + 1)]
    with graph.inserting_after(last):
        turned = graph.call_function(torch.ops.aten.permute.default, (kernel, dims))
    kernel.replace_all_uses_with(turned, lambda user: user is not turned)
    return TensorSpec((columns, *places, channels), spec.dtype)


class _Flat(nn.Module):
    """A graph as the module that it was traced from, which returns a tuple."""

    def __init__(self, graph: nn.Module) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(self.graph(*inputs))


def _is_kernel_of_1(node: torch.fx.Node) -> bool:
    """Whether it is an input that convolutions alone read, as a kernel of 1 x 1 or 1 x 1 x 1."""
    if node.op != "placeholder" or not node.users:
        return False
    shape = node.meta["val"].shape
    return (
        len(shape) in (4, 5)
        and prod(shape[2:]) == 1
        and all(user.target in CONVOLUTIONS and user.args[1] is node for user in node.users)
    )
