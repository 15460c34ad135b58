"""`Graph`: a model of any kind as a row of operations that can be cut into pipeline stages.

How a module becomes one is `parallel.graph_trace`; where to cut is `parallel.graph_cut`.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, pairwise

from torch import fx, nn

from parallel.errors import ConfigError
from parallel.graph_cost import Cost, Machine, cost_of
from parallel.graph_row import Row
from parallel.graph_stage import Collective, Piece, Stage, Value, shared_weights
from parallel.graph_trace import trace

__all__ = ["Collective", "Graph", "GraphUnit", "Piece", "Stage", "Value", "shared_weights"]


@dataclass(frozen=True)
class GraphUnit:
    """Consecutive operations of one module; the smallest part that a cut can move.

    Attributes:
        name: the module's path; "(root)" for operations of the model itself. A module that is
            called twice has two units of its name.
        start, stop: its places in the row of operations.
        costs: of its operations.
        weight_bytes: of the parameters and buffers that it reads.
    """

    name: str
    start: int
    stop: int
    costs: tuple[Cost, ...]
    weight_bytes: int

    @property
    def flops(self) -> int:
        return sum(cost.flops for cost in self.costs)

    @property
    def num_bytes(self) -> int:
        """Read and written."""
        return sum(cost.num_bytes for cost in self.costs)

    def seconds(self, machine: Machine) -> float:
        """An estimate, as its operations run one after the other."""
        return sum(cost.seconds(machine) for cost in self.costs)


class Graph:
    """A stateless model at fixed input shapes, as a row of operations in the order they run in.

    Attributes:
        module: the whole: called with the inputs, returns a tuple of the outputs.
        outputs: flattened; may repeat a value, or be an input.
        output_names: one for each output, such as "output", "output_0" or a dict's key.
        units: the row in the parts that a cut can move.
        module_names: of all submodules of the model, those without an operation included.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        inputs: Sequence[Value],
        output_names: Sequence[str],
        *,
        module_names: Sequence[str],
        atomic: Collection[str] = (),
    ) -> None:
        """Raises ConfigError: it computes nothing, or has a collective that stages cannot run."""
        self._row = Row(module, inputs)
        self.module = module
        self.inputs = tuple(inputs)
        self.outputs = tuple(self._row.value(node) for node in self._row.outputs)
        self.output_names = tuple(output_names)
        self.module_names = tuple(module_names)
        self.units = _units(self._row, atomic)
        if not self.units:
            raise ConfigError("the model computes nothing: its outputs are its inputs")

    @classmethod
    def trace(
        cls,
        module: nn.Module,
        inputs: Sequence[Value],
        *,
        atomic: Collection[str] = (),
        device: str = "cpu",
    ) -> "Graph":
        """Trace a module, in evaluation mode, on the CPU and without memory for activations.

        Args:
            module: its weights may be real, mapped from a file, or on the meta device.
            inputs: what it is called with, in order.
            atomic: paths of modules to count as one unit, whatever is in them.
            device: where the graph will run; operations that name a device get this one.

        Raises:
            ConfigError: it cannot be traced, changes its buffers, draws random numbers, has a shape
                that depends on data, returns something that is not a tensor, or computes nothing.
        """
        names = [value.name for value in inputs]
        if len(set(names)) < len(names):
            raise ConfigError(f"two inputs have one name in {', '.join(names)}; rename one")
        traced = trace(module, inputs, device)
        return cls(
            traced.module,
            inputs,
            traced.output_names,
            module_names=traced.module_names,
            atomic=atomic,
        )

    @cached_property
    def boundary_bytes(self) -> tuple[int, ...]:
        """For each unit, the bytes that live at its beginning: what a cut there has to send."""
        live = self._row.live_bytes()
        return tuple(live[unit.start] for unit in self.units)

    def carries(self, boundary: int) -> tuple[Value, ...]:
        """The values that live at the beginning of a unit."""
        return self._row.live(self.units[boundary].start)

    def stages(self, boundaries: Sequence[int] = ()) -> tuple[Stage, ...]:
        """Cut the row.

        Args:
            boundaries: the units with which the stages after the first begin.

        Raises:
            ConfigError: they do not ascend from 1 to the last unit.
        """
        if any(a >= b for a, b in pairwise([0, *boundaries, len(self.units)])):
            raise ConfigError(
                f"stages that begin with units {list(boundaries)} are not all of one unit or more; "
                f"use ascending numbers from 1 to {len(self.units) - 1}"
            )
        places = [0, *(self.units[b].start for b in boundaries), self.units[-1].stop]
        return tuple(self._row.stage(start, stop) for start, stop in pairwise(places))


def _units(row: Row, atomic: Collection[str]) -> tuple[GraphUnit, ...]:
    units: list[GraphUnit] = []
    names = (_unit_name(operation[0].meta["path"], atomic) for operation in row.operations)
    start = 0
    for name, places in groupby(names):
        stop = start + len(list(places))
        nodes = [node for operation in row.operations[start:stop] for node in operation]
        weights = {n for node in nodes for n in node.all_input_nodes if n.op == "get_attr"}
        weight_bytes = sum(node.meta["val"].nbytes for node in weights)
        costs = tuple(cost_of(operation[0]) for operation in row.operations[start:stop])
        units.append(GraphUnit(name, start, stop, costs, weight_bytes))
        start = stop
    return tuple(units)


def _unit_name(path: str, atomic: Collection[str]) -> str:
    parts = path.split(".")
    outer = (".".join(parts[:n]) for n in range(1, len(parts)))
    return next((name for name in outer if name in atomic), path) or "(root)"
