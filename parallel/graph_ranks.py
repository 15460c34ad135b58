"""`Ranks`: what every rank of a tensor model holds and keeps in memory, and whether a cut fits the
twins that the ranks run.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from parallel.errors import ConfigError
from parallel.graph import Graph
from parallel.graph_cost import cost_of
from parallel.graph_plan import Bucket
from parallel.graph_stage import Piece, Stage
from parallel.graph_twin import atomic_of, twin_of, values_of
from parallel.plan import LocalTensor, RankPlan
from parallel.plan import Piece as TensorPiece
from parallel.topology import Topology


@dataclass(frozen=True)
class Ranks:
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
        applied = twin_of(self.module, self.tp_plan, self.topology, rank)
        graph = self.whole
        if applied.module is not self.module:
            atomic = atomic_of(self.module, self.topology, self.tp_plan)
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
            activation_bytes=max((peak_bytes(piece) for piece in stage.pieces), default=0),
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


def peak_bytes(piece: Piece) -> int:
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
