"""A plan of a tensor model: what each rank holds, what crosses, and which divisions are refused."""

from collections.abc import Sequence

import pytest
import torch
from apply_jobs import VISION_PLAN, Vision
from graph_models import Mlp, UNet
from torch import nn

from parallel.errors import ConfigError
from parallel.graph import Graph
from parallel.graph_plan import GraphPlan
from parallel.graph_planner import CutRequest, make_graph_plan
from parallel.graph_ranks import peak_bytes
from parallel.graph_stage import Value
from parallel.graph_twin import Tracer
from parallel.plan import Carry
from parallel.topology import Topology

MLP_PLAN = {"blocks.*.up": "colwise", "blocks.*.down": "rowwise"}
IMAGE = (4, 3, 8, 8)


def plan_of(
    module: nn.Module,
    shape: tuple[int, ...],
    tp_sizes: Sequence[int],
    *,
    tp_plan: dict[str, str] | None = None,
    split_points: list[str] | None = None,
    is_batched: bool = True,
) -> GraphPlan:
    bucket = (Carry("x", "float32", shape),)
    return make_graph_plan(
        module.eval(),
        [bucket],
        Topology.of(list(tp_sizes)),
        architecture="test",
        dtype="float32",
        is_batched=is_batched,
        cut=CutRequest(tp_plan=tp_plan, split_points=split_points),
    )


def test_stages_tile_the_model_and_hold_each_weight_once() -> None:
    module = UNet()
    plan = plan_of(module, (2, 2, 16, 16), [1, 1, 1])
    names = [tensor.name for rank in plan.ranks for tensor in rank.tensors]
    assert len(names) == len(set(names))
    assert {name for name, _ in module.named_parameters()} <= set(names)
    assert plan.boundaries == sorted(set(plan.boundaries))
    held = sum(rank.weight_bytes for rank in plan.ranks)
    used = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    assert held == sum(used[name].nbytes for name in names)
    assert all(stage.carries for stage in plan.stages[:-1])
    assert plan.stages[-1].carries == ()


def test_uneven_shares_add_up_to_the_whole() -> None:
    """Five heads, 21 columns and 7 of the head over two ranks."""
    module = Vision().eval()
    plan = plan_of(module, IMAGE, [2], tp_plan=VISION_PLAN)
    held: dict[str, list[int]] = {}
    for rank in plan.ranks:
        for tensor in rank.tensors:
            held.setdefault(tensor.name, []).append(tensor.shape[tensor.dim])
    assert held["blocks.0.mlp.up.weight"] == [11, 10]
    assert held["head.weight"] == [4, 3]
    assert held["patches.weight"] == [10, 10]


def test_what_is_traced_for_a_rank_is_what_the_plan_says_of_it() -> None:
    module = Vision().eval()
    plan = plan_of(module, IMAGE, [2, 1], tp_plan=VISION_PLAN, split_points=["blocks.1"])
    tracer = Tracer(module, plan, VISION_PLAN)
    for rank in plan.ranks:
        stage, results = tracer.stage(plan.buckets[0], rank.rank)
        found = {name: tuple(tensor.shape) for name, tensor in stage.weights.items()}
        assert found == {tensor.name: tensor.shape for tensor in rank.tensors}
        assert [value.shape for value in results] == [(4, 7)]


def test_a_cut_through_split_values_needs_stages_of_one_size() -> None:
    asked = {"tp_plan": MLP_PLAN, "split_points": ["blocks.1.down"]}
    for tp_sizes in ([2, 1], [1, 2], [3, 2]):
        with pytest.raises(ConfigError, match=r"the cut before blocks.1.down lies between a layer"):
            plan_of(Mlp(), (4, 8), tp_sizes, **asked)  # type: ignore[arg-type]
    plan = plan_of(Mlp(), (4, 8), [2, 2], **asked)  # type: ignore[arg-type]
    assert len(plan.ranks) == 4


def test_an_output_that_is_left_split_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"leaves output output split: rank 0 has \[4, 2\] of"):
        plan_of(Mlp(), (4, 8), [2], tp_plan=MLP_PLAN | {"head": "colwise"})


def test_ranks_to_share_layers_need_a_tp_plan() -> None:
    with pytest.raises(ConfigError, match=r"sizes \[1, 2\] need parallel.tp_plan"):
        plan_of(Mlp(), (4, 8), [1, 2])


def test_an_output_without_the_batch_is_refused() -> None:
    class Mean(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean(0)

    with pytest.raises(ConfigError, match=r"output output has shape \[8\], whose first dim"):
        plan_of(Mean(), (4, 8), [1])
    assert plan_of(Mean(), (4, 8), [1], is_batched=False).outputs[0].shape == (8,)


class Views(nn.Module):
    """Makes 4 KB, looks at it in another shape, and makes as much twice more from the view."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = x + 1
        view = made.view(-1)
        other = view * 2
        return (other + view).sum()


class Parts(nn.Module):
    """One operation that makes two results of 4 and 8 KB."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values, places = x.topk(1024)
        return values.sum() + places.sum()


@pytest.mark.parametrize(
    ("module", "kib"),
    [
        # made, other and their sum; the input is gone by then
        (Views(), 12),
        # the input and both results
        (Parts(), 16),
    ],
    ids=["view", "parts"],
)
def test_activations_live_until_the_last_use_of_any_view(module: nn.Module, kib: int) -> None:
    graph = Graph.trace(module.eval(), [Value("x", "float32", (1024,))])
    ((piece,),) = (stage.pieces for stage in graph.stages())
    assert kib * 1024 <= peak_bytes(piece) < kib * 1024 + 64
