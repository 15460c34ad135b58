"""A module's graph as its ranks run it: each rank's twin, traced at the shapes of a bucket.

Which rank runs which units is the plan's; how it is decided is `parallel.graph_planner`.
"""

from collections.abc import Mapping, Sequence

from torch import nn

from parallel.apply import Applied, apply
from parallel.collectives import Group
from parallel.errors import ConfigError
from parallel.graph import Graph
from parallel.graph_layout import with_channels_last
from parallel.graph_plan import Bucket, GraphPlan
from parallel.graph_stage import Stage, Value
from parallel.topology import Topology

Traced = dict[Bucket, Graph]
"""The undivided module at some shapes."""


def trace_whole(
    module: nn.Module,
    bucket: Bucket,
    topology: Topology,
    tp_plan: Mapping[str, str] | None,
    *,
    device: str = "cpu",
) -> Graph:
    """The undivided model in one bucket, in the units that the boundaries of its plan count.

    Args:
        device: where it will run.

    Raises:
        ConfigError: it cannot be traced.
    """
    atomic = atomic_of(module, topology, tp_plan)
    return Graph.trace(module, values_of(bucket), atomic=atomic, device=device)


def values_of(bucket: Bucket) -> tuple[Value, ...]:
    """The inputs of a bucket as the graph takes them."""
    return tuple(Value(c.name, c.dtype, tuple(map(int, c.shape))) for c in bucket)


class Tracer:
    """Traces what ranks run, as a plan divides it; ranks that split no layer share their graphs."""

    def __init__(
        self,
        module: nn.Module,
        plan: GraphPlan,
        tp_plan: Mapping[str, str] | None,
        *,
        traced: Traced | None = None,
        device: str = "cpu",
        channels_last: bool = False,
    ) -> None:
        """
        Args:
            traced: graphs of the undivided module that there are already, for `device`.
            device: where the graphs will run.
            channels_last: see `parallel.graph_layout`.
        """
        self._module = module
        self._plan = plan
        self._tp_plan = tp_plan
        self._device = device
        self._channels_last = channels_last
        self._atomic = atomic_of(module, plan.topology, tp_plan)
        self._whole: Traced = {} if traced is None else traced

    def stage(self, bucket: Bucket, rank: int) -> tuple[Stage, tuple[Value, ...]]:
        """What a rank runs in one bucket, and what the whole model returns, in the plan's order.

        Raises:
            ConfigError: the model runs other modules at these shapes, or on this rank, than those
                that were planned.
        """
        index = self._plan.topology.coordinate(rank).stage
        graph = self._graph(bucket, rank)
        found = modules_of(graph, *span(graph, self._plan.boundaries, index))
        planned = self._plan.stages[index].modules
        if found != planned:
            differing = (a for a, b in zip(found, planned, strict=False) if a != b)
            raise ConfigError(
                f"at inputs {', '.join(map(str, values_of(bucket)))} rank {rank} runs other "
                f"modules in stage {index} than planned, from {next(differing, found[-1])} on; "
                "give all buckets shapes at which the model does the same"
            )
        stages = graph.stages(self._plan.boundaries)
        if self._channels_last:
            stages = with_channels_last(stages)
        return stages[index], graph.outputs

    def _graph(self, bucket: Bucket, rank: int) -> Graph:
        applied = twin_of(self._module, self._tp_plan, self._plan.topology, rank)
        if applied.module is not self._module:
            return self._trace(applied.module, bucket)
        if bucket not in self._whole:
            self._whole[bucket] = self._trace(self._module, bucket)
        return self._whole[bucket]

    def _trace(self, module: nn.Module, bucket: Bucket) -> Graph:
        return Graph.trace(module, values_of(bucket), atomic=self._atomic, device=self._device)


def twin_of(
    module: nn.Module, tp_plan: Mapping[str, str] | None, topology: Topology, rank: int
) -> Applied:
    """A rank's twin of the module; without tensor parallelism the module itself."""
    here = topology.coordinate(rank)
    group = Group(tuple(topology.ranks(here.stage)), here.tp_rank)
    if group.size == 1 or not tp_plan:
        return Applied(module, frozenset(), {})
    return apply(module, tp_plan, group)


def atomic_of(
    module: nn.Module, topology: Topology, tp_plan: Mapping[str, str] | None
) -> frozenset[str]:
    """The layers that some ranks hold a share of; on the others they count as one part, too."""
    widest = topology.tp_sizes.index(max(topology.tp_sizes))
    return twin_of(module, tp_plan, topology, topology.ranks(widest)[0]).atomic


def span(graph: Graph, boundaries: Sequence[int], stage: int) -> tuple[int, int]:
    """The units of a stage."""
    ends = [0, *boundaries, len(graph.units)]
    return ends[stage], ends[stage + 1]


def modules_of(graph: Graph, start: int, stop: int) -> tuple[str, ...]:
    """The modules of a run of units, each once."""
    return tuple(dict.fromkeys(unit.name for unit in graph.units[start:stop]))
