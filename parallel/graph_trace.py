"""Trace a module into a plain row of functional operations.

What comes out calls nothing but operators on tensors, at fixed shapes, and depends on no memory
layout. Where it may be cut is `parallel.graph_row`.
"""

import ctypes
import hashlib
import keyword
import operator
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from parallel.errors import ConfigError
from parallel.graph_export import export
from parallel.graph_refuse import output_names, refuse_operations, refuse_state, user_outputs
from parallel.graph_stage import Value

_aten = torch.ops.aten
_c10d = torch.ops._c10d_functional

PARTS = (operator.getitem, _c10d.wait_tensor.default)
"""What completes the operation before it, so that no cut may fall between the two."""

_IDENTITIES = (_aten.clone.default, _aten.detach.default, _aten.alias.default)
# Views need strides that a tensor from another rank or another kernel may not have.
_VIEWS = (_aten.view.default, _aten._unsafe_view.default)


@dataclass(frozen=True)
class Traced:
    """A traced module.

    Attributes:
        module: placeholders; the parameters and buffers used; operations, each with its parts right
            behind it; a flat tuple of outputs. An operation's `meta["path"]` is the path of the
            module that it ran in, and `meta["val"]` its fake result.
        output_names: one for each output.
        module_names: of all submodules, also those without an operation.
    """

    module: fx.GraphModule
    output_names: tuple[str, ...]
    module_names: tuple[str, ...]


def trace(module: nn.Module, inputs: Sequence[Value], device: str) -> Traced:
    """Trace `module` on the CPU, as a graph that runs on `device`.

    Raises:
        ConfigError: it cannot be traced, changes its buffers, draws random numbers, has a shape
            that depends on data, or returns something that is not a tensor.
    """
    program = export(module, inputs)
    refuse_state(program)
    outputs = user_outputs(program)
    live = _feeding(outputs)
    nodes = [node for node in program.graph.nodes if node in live]
    refuse_operations(nodes)
    rebuilt = _Rebuild(live, torch.device(device))
    rebuilt.add_inputs(_inputs(program), inputs)
    for node, name, tensor in _weights(program, module, live):
        rebuilt.add_weight(node, name, tensor)
    for node in nodes:
        if node.op == "call_function" and node.target not in PARTS:
            rebuilt.add_operation(node)
    names = tuple(name for name, _ in module.named_modules() if name)
    return Traced(rebuilt.finish(outputs), output_names(program), names)


def _feeding(outputs: Iterable[fx.Node]) -> set[fx.Node]:
    """All nodes that the outputs depend on. In a functional graph nothing else has an effect."""
    live, waiting = set[fx.Node](), list(outputs)
    while waiting:
        node = waiting.pop()
        if node not in live:
            live.add(node)
            waiting.extend(node.all_input_nodes)
    return live


def _inputs(program: ExportedProgram) -> list[fx.Node]:
    nodes = [node for node in program.graph.nodes if node.op == "placeholder"]
    specs = program.graph_signature.input_specs
    return [n for n, s in zip(nodes, specs, strict=True) if s.kind == InputKind.USER_INPUT]


def _weights(
    program: ExportedProgram, module: nn.Module, live: set[fx.Node]
) -> Iterable[tuple[fx.Node, str, torch.Tensor]]:
    """The live parameters, buffers and constants: node, name in the model, the model's tensor.

    A tensor of several names has the first of them everywhere.
    """
    tensors: dict[str, torch.Tensor] = dict(module.named_parameters(remove_duplicate=False))
    tensors |= dict(module.named_buffers(remove_duplicate=False))
    first: dict[int, str] = {}
    for name, tensor in tensors.items():
        first.setdefault(id(tensor), name)
    nodes = {node.name: node for node in live if node.op == "placeholder"}
    for spec in program.graph_signature.input_specs:
        if spec.kind == InputKind.USER_INPUT or spec.arg.name not in nodes:
            continue
        target = str(spec.target)
        if target in tensors:
            yield nodes[spec.arg.name], first[id(tensors[target])], tensors[target]
        else:
            constant = program.constants[target]
            yield nodes[spec.arg.name], _name_of_constant(constant), constant


def _name_of_constant(tensor: torch.Tensor) -> str:
    """After its contents: traces at other shapes number their constants in their own way."""
    data = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(ctypes.string_at(data.data_ptr(), data.nbytes))
    return f"constant_{digest.hexdigest()[:12]}"


def _identifier(name: str) -> str:
    plain = re.sub(r"\W", "_", name, flags=re.ASCII)
    reserved = ("self", *keyword.kwlist)
    return plain if plain.isidentifier() and plain not in reserved else f"input_{plain}"


class _Rebuild:
    """A graph written anew, with its weights as attributes."""

    def __init__(self, live: set[fx.Node], device: torch.device) -> None:
        self._live = live
        self._device = device
        self._graph = fx.Graph()
        self._new: dict[fx.Node, fx.Node] = {}
        self._tensors: dict[str, torch.Tensor] = {}
        self._held: dict[str, fx.Node] = {}
        self._path = ""

    def add_inputs(self, nodes: Sequence[fx.Node], values: Sequence[Value]) -> None:
        for node, value in zip(nodes, values, strict=True):
            new = self._graph.placeholder(_identifier(value.name))
            new.target = new.name  # Distinct even where two names differ in their signs alone.
            new.meta = {"val": node.meta["val"]}
            self._new[node] = new

    def add_weight(self, node: fx.Node, name: str, tensor: torch.Tensor) -> None:
        if name not in self._held:
            self._tensors[name] = tensor
            self._held[name] = self._graph.get_attr(name)
            self._held[name].meta = {"val": node.meta["val"]}
        self._new[node] = self._held[name]

    def add_operation(self, node: fx.Node) -> None:
        """Copy an operation and its parts, or leave it out if it only copies."""
        if stack := node.meta.get("nn_module_stack"):
            # What has none, such as a view that torch makes anew, belongs to what runs before it.
            self._path = list(stack.values())[-1][0]
        if node.target in _IDENTITIES and "memory_format" not in node.kwargs:
            self._new[node] = self._new[node.all_input_nodes[0]]
            return
        if node.target is _aten.as_strided.default:
            self._make_contiguous(node.all_input_nodes[0])
        if str(node.target).startswith("_c10d_functional"):
            self._new.update({n: self._computed(self._new[n]) for n in node.all_input_nodes})
        self._copy(node)

    def finish(self, outputs: Sequence[fx.Node]) -> fx.GraphModule:
        self._graph.output(tuple(self._computed(self._new[node]) for node in outputs))
        return fx.GraphModule(self._tensors, self._graph)

    def _copy(self, node: fx.Node) -> None:
        target = _aten.reshape.default if node.target in _VIEWS else node.target
        args = fx.node.map_aggregate(node.args, self._argument)
        kwargs = fx.node.map_aggregate(node.kwargs, self._argument)
        self._new[node] = self._graph.create_node(
            "call_function", target, args, kwargs, name=node.name
        )
        self._new[node].meta = {"val": node.meta["val"], "path": self._path}
        for user in node.users:
            if user in self._live and user.target in PARTS:
                self._copy(user)

    def _argument(self, argument: fx.node.Argument) -> fx.node.Argument:
        if isinstance(argument, fx.Node):
            return self._new[argument]
        return self._device if isinstance(argument, torch.device) else argument

    def _make_contiguous(self, node: fx.Node) -> None:
        value = node.meta["val"]
        if not value.is_contiguous() or value.storage_offset():
            raise ConfigError(
                f"as_strided reads {node.name} by its place in memory, which other ranks do not "
                "keep; use view, permute or unfold"
            )
        self._new[node] = self._clone(self._new[node], {"memory_format": torch.contiguous_format})

    def _computed(self, node: fx.Node) -> fx.Node:
        """The node, or a copy made by an operation if it is a weight: only those cross pieces."""
        return self._clone(node, {}) if node.op == "get_attr" else node

    def _clone(self, node: fx.Node, kwargs: dict[str, object]) -> fx.Node:
        clone = self._graph.call_function(_aten.clone.default, (node,), kwargs)  # type: ignore[arg-type]
        clone.meta = {"val": node.meta["val"], "path": self._path}
        return clone
