"""From a module and the shapes it runs at to a `GraphPlan`.

Needs no GPU and computes nothing: the module is traced with fake tensors. What is asked of a cut
comes from the configuration; where a cut is best is `parallel.graph_cut`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from parallel.apply import Applied, apply
from parallel.collectives import Group
from parallel.errors import ConfigError
from parallel.graph import Graph
from parallel.graph_cost import Machine, cost_of
from parallel.graph_cut import cut_at, cut_by_cost, cut_by_modules, cut_warnings, unit_seconds
from parallel.graph_plan import Bucket, GraphPlan, GraphStagePlan
from parallel.graph_stage import Piece, Stage, Value, shared_weights
from parallel.plan import Carry, LocalTensor, RankPlan
from parallel.plan import Piece as TensorPiece
from parallel.schedule import predict
from parallel.topology import Topology

NUM_MICROBATCHES = 16
"""For how many the bubble is predicted."""


Traced = dict[Bucket, Graph]
"""The undivided module at some shapes."""


@dataclass(frozen=True)
class CutRequest:
    """How a model is to be divided; all None: the cut by cost.

    Attributes:
        split_points: modules with which stages 1, 2, ... begin.
        stages: patterns of module names for each stage.
        tp_plan: pattern of module names -> style.
    """

    split_points: Sequence[str] | None = None
    stages: Sequence[Sequence[str]] | None = None
    tp_plan: Mapping[str, str] | None = None


def make_graph_plan(
    module: nn.Module,
    buckets: Sequence[Bucket],
    topology: Topology,
    *,
    architecture: str,
    dtype: str,
    is_batched: bool,
    cut: CutRequest,
    machine: Machine | None = None,
    traced: Traced | None = None,
    device: str = "cpu",
) -> GraphPlan:
    """Divide a module.

    Args:
        module: its weights may be on the meta device.
        buckets: the shapes it will run at, the smallest first.
        architecture: the module's name, kept for the reader of the plan.
        dtype: of weights and activations, such as "float32".
        is_batched: the first dim of all inputs and outputs counts samples.
        traced: takes the graph that is traced here, for a `Tracer`.
        device: where that graph will run.

    Raises:
        ConfigError: the module cannot be traced or divided so, or does not keep samples apart.
    """
    machine = machine or Machine()
    _check_tp(topology, cut.tp_plan)
    graph = trace_whole(module, buckets[-1], topology, cut.tp_plan, device=device)
    if traced is not None:
        traced[buckets[-1]] = graph
    if is_batched:
        _check_batched(graph)
    boundaries = _boundaries(graph, topology, cut, machine)
    seconds = unit_seconds(graph, None, machine)
    stages = tuple(
        _stage_plan(graph, boundaries, index, seconds, tp_size)
        for index, tp_size in enumerate(topology.tp_sizes)
    )
    ranks = _Ranks(module, buckets[-1], topology, cut.tp_plan, graph, boundaries)
    return GraphPlan(
        kind="graph",
        architecture=architecture,
        dtype=dtype,
        tp_sizes=topology.tp_sizes,
        devices=topology.devices,
        stages=stages,
        ranks=tuple(ranks.plans()),
        buckets=tuple(buckets),
        is_batched=is_batched,
        outputs=tuple(
            Carry(name, value.dtype, value.shape)
            for name, value in zip(graph.output_names, graph.outputs, strict=True)
        ),
        shared=shared_weights(graph.stages(boundaries)),
        num_microbatches=NUM_MICROBATCHES,
        bubble=bubble_of(stages, [stage.time_s for stage in stages], machine),
        warnings=cut_warnings(graph, boundaries, topology.tp_sizes, machine=machine),
    )


def bubble_of(
    stages: Sequence[GraphStagePlan], times: Sequence[float], machine: Machine | None = None
) -> float:
    """The share of the stages' time that they are predicted to wait.

    Rounded so that equal plans are equal on every host.

    Args:
        times: seconds of each stage for one micro-batch.
    """
    machine = machine or Machine()
    sends = [
        machine.send_seconds(sum(carry.num_bytes for carry in stage.carries))
        for stage in stages[:-1]
    ]
    busy = [max(time, machine.operation_s) for time in times]
    return round(predict(busy, NUM_MICROBATCHES, sends).bubble, 6)


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
    atomic = _atomic(module, topology, tp_plan)
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
    ) -> None:
        """
        Args:
            traced: graphs of the undivided module that there are already, for `device`.
            device: where the graphs will run.
        """
        self._module = module
        self._plan = plan
        self._tp_plan = tp_plan
        self._device = device
        self._atomic = _atomic(module, plan.topology, tp_plan)
        self._whole: Traced = {} if traced is None else traced

    def stage(self, bucket: Bucket, rank: int) -> tuple[Stage, tuple[Value, ...]]:
        """What a rank runs in one bucket, and what the whole model returns, in the plan's order.

        Raises:
            ConfigError: the model runs other modules at these shapes, or on this rank, than those
                that were planned.
        """
        index = self._plan.topology.coordinate(rank).stage
        graph = self._graph(bucket, rank)
        found = _modules(graph, *_span(graph, self._plan.boundaries, index))
        planned = self._plan.stages[index].modules
        if found != planned:
            differing = (a for a, b in zip(found, planned, strict=False) if a != b)
            raise ConfigError(
                f"at inputs {', '.join(map(str, values_of(bucket)))} rank {rank} runs other "
                f"modules in stage {index} than planned, from {next(differing, found[-1])} on; "
                "give all buckets shapes at which the model does the same"
            )
        return graph.stages(self._plan.boundaries)[index], graph.outputs

    def _graph(self, bucket: Bucket, rank: int) -> Graph:
        applied = _twin(self._module, self._tp_plan, self._plan.topology, rank)
        if applied.module is not self._module:
            return self._trace(applied.module, bucket)
        if bucket not in self._whole:
            self._whole[bucket] = self._trace(self._module, bucket)
        return self._whole[bucket]

    def _trace(self, module: nn.Module, bucket: Bucket) -> Graph:
        return Graph.trace(module, values_of(bucket), atomic=self._atomic, device=self._device)


def _twin(
    module: nn.Module, tp_plan: Mapping[str, str] | None, topology: Topology, rank: int
) -> Applied:
    """A rank's twin of the module; without tensor parallelism the module itself."""
    here = topology.coordinate(rank)
    group = Group(tuple(topology.ranks(here.stage)), here.tp_rank)
    if group.size == 1 or not tp_plan:
        return Applied(module, frozenset(), {})
    return apply(module, tp_plan, group)


def _atomic(
    module: nn.Module, topology: Topology, tp_plan: Mapping[str, str] | None
) -> frozenset[str]:
    """The layers that some ranks hold a share of; on the others they count as one part, too."""
    widest = topology.tp_sizes.index(max(topology.tp_sizes))
    return _twin(module, tp_plan, topology, topology.ranks(widest)[0]).atomic


def _check_tp(topology: Topology, tp_plan: Mapping[str, str] | None) -> None:
    if max(topology.tp_sizes) > 1 and not tp_plan:
        raise ConfigError(
            f"tensor-parallel sizes {list(topology.tp_sizes)} need parallel.tp_plan, which says "
            "how each module is split; give it, or cut the model into pipeline stages instead: "
            "parallel.pipeline_parallel_size"
        )


def _check_batched(graph: Graph) -> None:
    """Samples go into one batch and come out of it again, so every output must have that dim."""
    size = graph.inputs[0].shape[0]
    for name, value in zip(graph.output_names, graph.outputs, strict=True):
        if not value.shape or value.shape[0] != size:
            raise ConfigError(
                f"output {name} has shape {list(value.shape)}, whose first dim is not the batch of "
                f"{size}; give model.inputs a number in place of batch, so that samples run alone"
            )


def _boundaries(
    graph: Graph, topology: Topology, cut: CutRequest, machine: Machine
) -> tuple[int, ...]:
    if cut.split_points:
        return cut_at(graph, cut.split_points)
    if cut.stages:
        return cut_by_modules(graph, cut.stages)
    return cut_by_cost(graph, topology.tp_sizes, machine=machine)


def _span(graph: Graph, boundaries: Sequence[int], stage: int) -> tuple[int, int]:
    """The units of a stage."""
    ends = [0, *boundaries, len(graph.units)]
    return ends[stage], ends[stage + 1]


def _modules(graph: Graph, start: int, stop: int) -> tuple[str, ...]:
    """The modules of a run of units, each once."""
    return tuple(dict.fromkeys(unit.name for unit in graph.units[start:stop]))


def _stage_plan(
    graph: Graph,
    boundaries: Sequence[int],
    index: int,
    seconds: Sequence[float],
    tp_size: int,
) -> GraphStagePlan:
    start, stop = _span(graph, boundaries, index)
    units = graph.units[start:stop]
    carries = graph.carries(stop) if stop < len(graph.units) else ()
    return GraphStagePlan(
        modules=_modules(graph, start, stop),
        carries=tuple(Carry(v.name, v.dtype, v.shape) for v in carries),
        first_unit=start,
        num_ops=units[-1].stop - units[0].start,
        flops=sum(unit.flops for unit in units),
        time_s=float(f"{sum(seconds[start:stop]) / tp_size:.6g}"),
    )


@dataclass(frozen=True)
class _Ranks:
    """What every rank holds, found from the twin that it will run."""

    module: nn.Module
    bucket: Bucket
    topology: Topology
    tp_plan: Mapping[str, str] | None
    whole: Graph
    boundaries: Sequence[int]

    def plans(self) -> Iterator[RankPlan]:
        for rank in range(self.topology.world_size):
            yield self._plan(rank)

    def _plan(self, rank: int) -> RankPlan:
        here = self.topology.coordinate(rank)
        applied = _twin(self.module, self.tp_plan, self.topology, rank)
        graph = self.whole
        if applied.module is not self.module:
            atomic = _atomic(self.module, self.topology, self.tp_plan)
            graph = Graph.trace(applied.module, values_of(self.bucket), atomic=atomic)
            _check_same_row(graph, self.whole, rank)
            _check_joined(graph, self.whole, rank)
        stage = graph.stages(self.boundaries)[here.stage]
        self._check_carries(stage, here.stage)
        tensors = tuple(
            applied.tensors.get(name, _whole_tensor(name, tensor))
            for name, tensor in stage.weights.items()
        )
        return RankPlan(
            rank=rank,
            stage=here.stage,
            tp_rank=here.tp_rank,
            device=self.topology.devices[rank],
            tensors=tensors,
            weight_bytes=sum(tensor.nbytes for tensor in stage.weights.values()),
            activation_bytes=max((_peak_bytes(piece) for piece in stage.pieces), default=0),
        )

    def _check_carries(self, stage: Stage, index: int) -> None:
        """A value that ranks hold parts of can cross only to a stage that is split the same."""
        whole, sizes = self.whole.stages(self.boundaries), self.topology.tp_sizes
        for after, values in ((index, stage.receives), (index + 1, stage.sends)):
            if not 0 < after < len(sizes) or sizes[after - 1] == sizes[after]:
                continue
            for value, expected in zip(values, whole[after].receives, strict=True):
                if value.shape != expected.shape:
                    raise ConfigError(
                        f"the cut before {self.whole.units[self.boundaries[after - 1]].name} lies "
                        f"between a layer that parallel.tp_plan splits and the one that joins it "
                        f"again, and stages {after - 1} and {after} have {sizes[after - 1]} and "
                        f"{sizes[after]} ranks; cut elsewhere by parallel.split_points, or give "
                        "both stages as many ranks"
                    )


def _check_joined(twin: Graph, whole: Graph, rank: int) -> None:
    """What the model returns is read from one rank."""
    for name, found, expected in zip(whole.output_names, twin.outputs, whole.outputs, strict=True):
        if found.shape != expected.shape:
            raise ConfigError(
                f"parallel.tp_plan leaves output {name} split: rank {rank} has "
                f"{list(found.shape)} of {list(expected.shape)}; let a rowwise layer join it, or "
                "use colwise_gather_output"
            )


def _check_same_row(twin: Graph, whole: Graph, rank: int) -> None:
    """A cut counts units, so both must have the same."""
    names = [[unit.name for unit in graph.units] for graph in (twin, whole)]
    if names[0] != names[1]:
        differing = next((a for a, b in zip(*names, strict=False) if a != b), names[1][-1])
        raise ConfigError(
            f"parallel.tp_plan changes what rank {rank} runs around {differing} beyond the layers "
            "that it splits; leave that layer out of it"
        )


def _whole_tensor(name: str, tensor: torch.Tensor) -> LocalTensor:
    return LocalTensor(name, tuple(tensor.shape), 0, (TensorPiece(name),))


def _peak_bytes(piece: Piece) -> int:
    """The most bytes of activations that live at once, if each is freed after its last use.

    A use of a view, or of one of several results, is a use of what was made.
    """
    nodes = [n for n in piece.module.graph.nodes if n.op in ("placeholder", "call_function")]
    owners: dict[fx.Node, fx.Node] = {}
    last: dict[fx.Node, int] = {}
    for place, node in enumerate(nodes):
        sources = [owners.get(source, source) for source in node.all_input_nodes]
        owners[node] = node if _made_bytes(node) or not sources else sources[0]
        last.update(dict.fromkeys(sources, place))
    live = peak = 0
    for place, node in enumerate(nodes):
        live += _made_bytes(node)
        peak = max(peak, live)
        for owner in {owners.get(source, source) for source in node.all_input_nodes}:
            if last[owner] == place:
                live -= _made_bytes(owner)
    return peak


def _made_bytes(node: fx.Node) -> int:
    """Of what an operation makes, in all its results; a view makes nothing, a weight is there."""
    if node.op == "get_attr" or (node.op == "call_function" and not cost_of(node).num_bytes):
        return 0
    results = pytree.tree_leaves(node.meta.get("val"))
    return sum(result.nbytes for result in results if isinstance(result, torch.Tensor))
