"""What an operation of a traced graph costs: arithmetic, bytes moved, and an estimate of its time.

Estimates order the cuts of one model; they are no forecast. A measured time can replace each.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import fx
from torch.utils import _pytree as pytree

_aten = torch.ops.aten


@dataclass(frozen=True)
class Machine:
    """How fast a GPU and the link to the next one are; the defaults are about those of an H200.

    Attributes:
        half_flops_per_s, single_flops_per_s: multiplications and additions of 16-bit numbers, and
            of wider ones.
        bytes_per_s: to and from its own memory.
        operation_s: what the shortest operation takes, inside a CUDA graph.
        link_bytes_per_s, link_s: sending to another GPU, and the least that takes.
    """

    half_flops_per_s: float = 700e12
    single_flops_per_s: float = 50e12
    bytes_per_s: float = 4.3e12
    operation_s: float = 2e-6
    link_bytes_per_s: float = 350e9
    link_s: float = 10e-6

    def send_seconds(self, num_bytes: int) -> float:
        return self.link_s + num_bytes / self.link_bytes_per_s if num_bytes else 0.0


@dataclass(frozen=True)
class Cost:
    """Of one operation.

    Attributes:
        flops: multiplications and additions.
        num_bytes: read and written, weights included; 0 for a view.
        is_half: it computes with numbers of at most 16 bits.
    """

    flops: int
    num_bytes: int
    is_half: bool

    def seconds(self, machine: Machine) -> float:
        """By the roofline: arithmetic and memory traffic overlap, so the longer one counts."""
        if not self.num_bytes:
            return 0.0
        rate = machine.half_flops_per_s if self.is_half else machine.single_flops_per_s
        roof = max(self.flops / rate, self.num_bytes / machine.bytes_per_s)
        return max(roof, machine.operation_s)


def cost_of(node: fx.Node) -> Cost:
    """That of an operation, from the shapes of its fake inputs and results."""
    results = _tensors(node.meta["val"])
    is_half = all(t.dtype.itemsize <= 2 for t in results if t.is_floating_point())
    if not isinstance(node.target, torch._ops.OpOverload) or node.target.is_view:
        return Cost(0, 0, is_half)  # A part of an operation that was counted, or a view.
    packet = node.target.overloadpacket
    written = sum(tensor.nbytes for tensor in results)
    if packet in _LOOK_UPS:
        return Cost(0, 2 * written, is_half)
    read = sum(t.nbytes for source in node.all_input_nodes for t in _tensors(source.meta["val"]))
    num_results = sum(tensor.numel() for tensor in results)
    count = _FLOPS.get(packet)
    flops = count(node.args, num_results) if count else num_results
    return Cost(flops, written + read, is_half)


def _tensors(value: object) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _shape(argument: object) -> tuple[int, ...]:
    assert isinstance(argument, fx.Node)
    return tuple(argument.meta["val"].shape)


# Each of these takes an operation's arguments and the number of elements that it makes.
Args = tuple[fx.node.Argument, ...]


def _product(args: Args, num_results: int) -> int:
    return 2 * num_results * _shape(args[0])[-1]


def _sum_and_product(args: Args, num_results: int) -> int:
    return 2 * num_results * _shape(args[1])[-1]


def _convolution(args: Args, num_results: int) -> int:
    return 2 * num_results * math.prod(_shape(args[1])[1:])


def _transposed_convolution(args: Args, num_results: int) -> int:  # noqa: ARG001
    return 2 * math.prod(_shape(args[0])) * math.prod(_shape(args[1])[1:])


def _any_convolution(args: Args, num_results: int) -> int:
    return (_transposed_convolution if args[6] else _convolution)(args, num_results)


def _attention(args: Args, num_results: int) -> int:  # noqa: ARG001
    query, key, value = (_shape(arg) for arg in args[:3])
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _recurrent(args: Args, num_results: int) -> int:  # noqa: ARG001
    weights = args[2]
    assert isinstance(weights, Sequence)
    shapes = [_shape(weight) for weight in weights]
    return 2 * math.prod(_shape(args[0])[:2]) * sum(math.prod(s) for s in shapes if len(s) == 2)


def _einsum(args: Args, num_results: int) -> int:
    equation, operands = str(args[0]).replace(" ", ""), args[1]
    assert isinstance(operands, Sequence)
    shapes = [_shape(operand) for operand in operands]
    if "." in equation:
        return 2 * num_results * shapes[0][-1]
    terms = equation.split("->")[0].split(",")
    sizes = {
        label: n
        for term, s in zip(terms, shapes, strict=True)
        for label, n in zip(term, s, strict=True)
    }
    return 2 * math.prod(sizes.values())


_FLOPS: dict[object, Callable[[Args, int], int]] = {
    **dict.fromkeys((_aten.linear, _aten.matmul, _aten.mm, _aten.bmm), _product),
    **dict.fromkeys((_aten.addmm, _aten.baddbmm), _sum_and_product),
    **dict.fromkeys((_aten.conv1d, _aten.conv2d, _aten.conv3d), _convolution),
    **dict.fromkeys(
        (_aten.conv_transpose1d, _aten.conv_transpose2d, _aten.conv_transpose3d),
        _transposed_convolution,
    ),
    _aten.convolution: _any_convolution,
    _aten.scaled_dot_product_attention: _attention,
    **dict.fromkeys((_aten.lstm, _aten.gru), _recurrent),
    _aten.einsum: _einsum,
}
"""Operations that do more than one addition or multiplication an element."""

_LOOK_UPS = (_aten.embedding, _aten.index, _aten.index_select, _aten.gather)
"""Operations that read as much of their first input as they return."""
