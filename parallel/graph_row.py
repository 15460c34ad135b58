"""A traced graph as a row of operations, with the life of every value along it.

It cuts any part of the row into a `Stage`; which part is `parallel.graph`'s to say.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate

import torch
from torch import fx

from parallel.errors import ConfigError
from parallel.graph_stage import Collective, Piece, Stage, Value
from parallel.graph_trace import PARTS

_c10d = torch.ops._c10d_functional
_COLLECTIVES = {
    _c10d.all_reduce.default: "all_reduce",
    _c10d.all_gather_into_tensor.default: "all_gather",
}


class Row:
    """The operations of a graph in the order in which they run.

    Places count operations from 0; place n lies before operation n. A value lives from the place
    after the operation that makes it (an input from 0) up to the last operation that reads it (an
    output to the end).

    Attributes:
        operations: each an operation with its parts: what it returns, or what waits for it.
        outputs: flat; may repeat a node or be an input.
    """

    def __init__(self, module: fx.GraphModule, inputs: Sequence[Value]) -> None:
        """Raises ConfigError: a collective that stages cannot run."""
        self._module = module
        nodes = list(module.graph.nodes)
        self.operations = tuple(_operations(nodes))
        self.outputs: tuple[fx.Node, ...] = tuple(nodes[-1].args[0])
        given = [node for node in nodes if node.op == "placeholder"]
        self._values: dict[fx.Node, Value] = dict(zip(given, inputs, strict=True))
        self._made = dict.fromkeys(given, 0)
        for place, operation in enumerate(self.operations, start=1):
            for node in operation:
                if isinstance(node.meta["val"], torch.Tensor):
                    self._values[node] = Value.of(node.name, node.meta["val"])
                    self._made[node] = place
        self._last_read = self._find_last_reads()
        for operation in self.operations:
            _check_collective(operation)

    def value(self, node: fx.Node) -> Value:
        return self._values[node]

    def live(self, place: int) -> tuple[Value, ...]:
        """What a stage that begins there receives; for 0 all inputs, for the end the outputs."""
        if place == 0:
            return tuple(value for node, value in self._values.items() if node.op == "placeholder")
        if place == len(self.operations):
            return tuple(self._values[node] for node in dict.fromkeys(self.outputs))
        return tuple(
            self._values[node]
            for node, last in self._last_read.items()
            if self._made[node] <= place <= last
        )

    def live_bytes(self) -> list[int]:
        """The bytes of `live` at every place, both ends included."""
        steps = [0] * (len(self.operations) + 2)
        for node, last in self._last_read.items():
            steps[self._made[node]] += self._values[node].num_bytes
            steps[last + 1] -= self._values[node].num_bytes
        inner = list(accumulate(steps))[1 : len(self.operations)]
        ends = [sum(v.num_bytes for v in self.live(p)) for p in (0, len(self.operations))]
        return [ends[0], *inner, ends[1]]

    def stage(self, start: int, stop: int) -> Stage:
        """The operations from `start` to before `stop`."""
        steps: list[Piece | Collective] = []
        begin = start
        for place in range(start, stop):
            head = self.operations[place][0]
            if head.target in _COLLECTIVES:
                steps += self._pieces(begin, place)
                steps.append(self._collective(place))
                begin = place + 1
        steps += self._pieces(begin, stop)
        return Stage(tuple(steps), self.live(start), self.live(stop))

    def _find_last_reads(self) -> dict[fx.Node, int]:
        """Value -> the last operation that reads it, in the order in which they are made."""
        last: dict[fx.Node, int] = {}
        for place, operation in enumerate(self.operations):
            last.update(dict.fromkeys(_read_by(operation), place))
        last.update(dict.fromkeys(self.outputs, len(self.operations)))
        return {node: last[node] for node in self._values if node in last}

    def _collective(self, place: int) -> Collective:
        head, wait = self.operations[place]
        source = head.all_input_nodes[0]
        kind = _COLLECTIVES[head.target]  # type: ignore[index]
        return Collective(kind, self._values[source], self._values[wait])  # type: ignore[arg-type]

    def _pieces(self, start: int, stop: int) -> list[Piece]:
        """The operations as one piece, or nothing."""
        nodes = [node for operation in self.operations[start:stop] for node in operation]
        if not nodes:
            return []
        inside = set(nodes)
        read = {node for n in nodes for node in n.all_input_nodes if node not in inside}
        inputs = [node for node in self._values if node in read]
        outputs = [node for node in nodes if self._last_read.get(node, -1) >= stop]
        weights = sorted(node for node in read if node.op == "get_attr")
        module = self._module_of(inputs, weights, nodes, outputs)
        values = self._values
        return [Piece(module, tuple(values[n] for n in inputs), tuple(values[n] for n in outputs))]

    def _module_of(
        self,
        inputs: Sequence[fx.Node],
        weights: Sequence[fx.Node],
        nodes: Sequence[fx.Node],
        outputs: Sequence[fx.Node],
    ) -> fx.GraphModule:
        graph = fx.Graph()
        new: dict[fx.Node, fx.Node] = {}
        for node in inputs:
            new[node] = graph.placeholder(node.name)
            new[node].meta = dict(node.meta)
        for node in (*weights, *nodes):
            new[node] = graph.node_copy(node, new.__getitem__)
        # A no-op for most; the next piece, or the next rank, takes contiguous tensors.
        contiguous = torch.ops.aten.contiguous.default
        results = tuple(graph.call_function(contiguous, (new[node],)) for node in outputs)
        for result, node in zip(results, outputs, strict=True):
            result.meta = {"val": node.meta["val"]}
        graph.output(results)
        tensors = {str(node.target): _attribute(self._module, str(node.target)) for node in weights}
        return fx.GraphModule(tensors, graph)


def _operations(nodes: Iterable[fx.Node]) -> Iterator[tuple[fx.Node, ...]]:
    operation: list[fx.Node] = []
    for node in nodes:
        if node.op != "call_function":
            continue
        if operation and node.target not in PARTS:
            yield tuple(operation)
            operation = []
        operation.append(node)
    if operation:
        yield tuple(operation)


def _read_by(operation: Sequence[fx.Node]) -> list[fx.Node]:
    read = [source for node in operation for source in node.all_input_nodes]
    return [node for node in read if node not in operation and node.op != "get_attr"]


def _check_collective(operation: Sequence[fx.Node]) -> None:
    head = operation[0]
    if not str(head.target).startswith("_c10d_functional."):
        return
    where = f"{head.target} in {head.meta['path'] or '(root)'}"
    if head.target not in _COLLECTIVES:
        raise ConfigError(
            f"{where} is a collective that stages cannot run; use all_reduce or "
            "all_gather_into_tensor"
        )
    if head.target is _c10d.all_reduce.default and head.args[1] != "sum":
        raise ConfigError(f"{where} makes the {head.args[1]}; stages run only sums")
    if len(operation) != 2:
        raise ConfigError(f"{where} is not followed by one wait_tensor; wait for its result once")


def _attribute(module: torch.nn.Module, name: str) -> torch.Tensor:
    path, _, attribute = name.rpartition(".")
    tensor: torch.Tensor = getattr(module.get_submodule(path), attribute)
    return tensor
