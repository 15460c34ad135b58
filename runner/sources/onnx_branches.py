"""The graphs inside a node, and an If as the nodes of the branch that it takes.

Not here: how a node is computed.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from runner.sources.onnx_install import import_onnx

if TYPE_CHECKING:
    import onnx


def subgraphs(node: "onnx.NodeProto") -> "list[onnx.GraphProto]":
    """The branches of an If, the body of a Loop or the like."""
    return [
        graph
        for attribute in node.attribute
        for graph in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else []))
    ]


def operand_names(node: "onnx.NodeProto") -> list[str]:
    """Its inputs, and then what the graphs inside it read of the graph around them."""
    outer: list[str] = []
    for graph in subgraphs(node):
        own = _own_names(graph)
        read = [name for inner in graph.node for name in operand_names(inner)]
        read += [value.name for value in graph.output]
        outer += [name for name in read if name and name not in own]
    return [*node.input, *dict.fromkeys(outer)]


def taken_branch(node: "onnx.NodeProto", *, condition: bool) -> "list[onnx.NodeProto]":
    """An If whose condition is known, as nodes of the graph around it.

    The branch's own names get the If's first output before them, for those of two branches may be
    the same.
    """
    make_node = import_onnx().helper.make_node
    wanted = "then_branch" if condition else "else_branch"
    branch = next(attribute.g for attribute in node.attribute if attribute.name == wanted)
    names = {name: f"{node.output[0]}/{name}" for name in _own_names(branch)}
    stored = [make_node("Constant", [], [t.name], value=t) for t in branch.initializer]
    return [
        *(_renamed(inner, names) for inner in (*stored, *branch.node)),
        *(
            make_node("Identity", [names.get(value.name, value.name)], [output])
            for value, output in zip(branch.output, node.output, strict=True)
        ),
    ]


def _own_names(graph: "onnx.GraphProto") -> set[str]:
    entries = (*graph.input, *graph.initializer)
    made = {name for node in graph.node for name in node.output if name}
    return made | {entry.name for entry in entries}


def _renamed(node: "onnx.NodeProto", names: Mapping[str, str]) -> "onnx.NodeProto":
    renamed: onnx.NodeProto = import_onnx().NodeProto()
    renamed.CopyFrom(node)
    renamed.input[:] = [names.get(name, name) for name in node.input]
    renamed.output[:] = [names.get(name, name) for name in node.output]
    for graph in subgraphs(renamed):
        for inner in graph.node:
            inner.CopyFrom(_renamed(inner, names))
        for value in graph.output:
            value.name = names.get(value.name, value.name)
    return renamed
