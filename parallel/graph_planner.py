"""From a module and the shapes it runs at to a `GraphPlan`.

Needs no GPU and computes nothing: the module is traced with fake tensors. What is asked of a cut
comes from the configuration; where a cut is best is `parallel.graph_cut`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from parallel.errors import ConfigError
from parallel.graph import Graph
from parallel.graph_cost import Machine
from parallel.graph_cut import cut_at, cut_by_cost, cut_by_modules, cut_warnings, unit_seconds
from parallel.graph_plan import Bucket, GraphPlan, GraphStagePlan
from parallel.graph_ranks import Ranks
from parallel.graph_stage import shared_weights
from parallel.graph_twin import Traced, modules_of, span, trace_whole
from parallel.plan import Carry
from parallel.schedule import predict
from parallel.topology import Topology

NUM_MICROBATCHES = 16
"""For how many the bubble is predicted."""


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
    ranks = Ranks(module, buckets[-1], topology, cut.tp_plan, graph, boundaries)
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


def _stage_plan(
    graph: Graph,
    boundaries: Sequence[int],
    index: int,
    seconds: Sequence[float],
    tp_size: int,
) -> GraphStagePlan:
    start, stop = span(graph, boundaries, index)
    units = graph.units[start:stop]
    carries = graph.carries(stop) if stop < len(graph.units) else ()
    return GraphStagePlan(
        modules=modules_of(graph, start, stop),
        carries=tuple(Carry(v.name, v.dtype, v.shape) for v in carries),
        first_unit=start,
        num_ops=units[-1].stop - units[0].start,
        flops=sum(unit.flops for unit in units),
        time_s=float(f"{sum(seconds[start:stop]) / tp_size:.6g}"),
    )
