"""Feature maps that cross from stage to stage with their channels last.

Convolutions on a GPU compute in that layout, and a compiler that keeps its own between them would
otherwise bring a carry into PyTorch's, and out of it again.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import fx

from parallel.graph_stage import Piece, Stage, Value

_FEATURE_MAPS = (4, 5)
"""Dims of images and volumes, in batches."""


def with_channels_last(stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """The stages of a graph, which compute the same. What they send one another between
    convolutions has the shape (batch, height, width, channels), or that of volumes; what the graph
    is given and returns stays as it is.
    """
    ends = {value.name for value in (*stages[0].receives, *stages[-1].sends)}
    ends |= _summed_or_gathered(stages)
    carries = dict.fromkeys(value for stage in stages[:-1] for value in stage.sends)
    names = frozenset(
        value.name
        for value in carries
        if value.name not in ends
        and all(_makes(stage, value) for stage in stages if _has(stage, value, "outputs"))
        and all(_convolves(stage, value) for stage in stages if _has(stage, value, "inputs"))
    )
    return tuple(_turn_stage(stage, names) for stage in stages) if names else tuple(stages)


def _summed_or_gathered(stages: Iterable[Stage]) -> set[str]:
    """What collectives read or make, whose dims they count."""
    collectives = [step for s in stages for step in s.steps if not isinstance(step, Piece)]
    return {value.name for step in collectives for value in (step.input, step.output)}


def _has(stage: Stage, value: Value, where: Literal["inputs", "outputs"]) -> bool:
    """Whether a piece of a stage takes a value, or makes it; not whether it sends it on."""
    return any(value in getattr(piece, where) for piece in stage.pieces)


def _makes(stage: Stage, value: Value) -> bool:
    """Whether a value has the channels of what a stage convolves."""
    return any(made.shape[1] == value.shape[1] for _, made in _convolutions(stage, value))


def _convolves(stage: Stage, value: Value) -> bool:
    """Whether a stage convolves feature maps of the size of a value."""
    return any(taken.shape[2:] == value.shape[2:] for taken, _ in _convolutions(stage, value))


def _convolutions(stage: Stage, value: Value) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """What the convolutions of a stage take and make, of as many dims as a value, if that can be a
    feature map.
    """
    dims = len(value.shape)
    if dims not in _FEATURE_MAPS or not value.torch_dtype.is_floating_point:
        return
    for node in (node for piece in stage.pieces for node in piece.module.graph.nodes):
        if node.op == "call_function" and str(node.target).startswith("aten.conv"):
            taken = node.all_input_nodes[0].meta["val"]
            if taken.ndim == dims:
                yield taken, node.meta["val"]


def _turn_stage(stage: Stage, names: frozenset[str]) -> Stage:
    steps = (_turn_piece(s, names) if isinstance(s, Piece) else s for s in stage.steps)
    receives, sends = (_turn_values(values, names) for values in (stage.receives, stage.sends))
    return Stage(tuple(steps), receives, sends)


def _turn_values(values: Sequence[Value], names: frozenset[str]) -> tuple[Value, ...]:
    return tuple(
        replace(v, shape=(v.shape[0], *v.shape[2:], v.shape[1])) if v.name in names else v
        for v in values
    )


def _turn_piece(piece: Piece, names: frozenset[str]) -> Piece:
    """It takes and returns the named values with channels last."""
    if not any(value.name in names for value in (*piece.inputs, *piece.outputs)):
        return piece
    inputs, outputs = (_turn_values(values, names) for values in (piece.inputs, piece.outputs))
    old, graph = piece.module.graph, fx.Graph()
    new: dict[fx.Node, fx.Node] = {}
    given = [node for node in old.nodes if node.op == "placeholder"]
    for node, value in zip(given, inputs, strict=True):
        new[node] = graph.placeholder(node.name)
        new[node].meta = dict(node.meta)
        if value.name in names:
            new[node].meta = {"val": node.meta["val"].movedim(1, -1).contiguous()}
            dims = len(value.shape)
            new[node] = _permuted(graph, new[node], (0, dims - 1, *range(1, dims - 1)))
    results = graph.graph_copy(old, new)
    assert isinstance(results, tuple)
    made = [
        _contiguous(graph, _permuted(graph, node, (0, *range(2, len(v.shape)), 1)))
        if v.name in names
        else node
        for node, v in zip(results, outputs, strict=True)
    ]
    graph.output(tuple(made))
    return Piece(fx.GraphModule(piece.module, graph), inputs, outputs)


def _permuted(graph: fx.Graph, node: fx.Node, order: tuple[int, ...]) -> fx.Node:
    permuted = graph.call_function(torch.ops.aten.permute.default, (node, list(order)))
    permuted.meta = {"val": node.meta["val"].permute(order)}
    return permuted


def _contiguous(graph: fx.Graph, node: fx.Node) -> fx.Node:
    contiguous = graph.call_function(torch.ops.aten.contiguous.default, (node,))
    contiguous.meta = {"val": node.meta["val"].contiguous()}
    return contiguous
