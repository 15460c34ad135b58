"""Graphs and their stages: run one after the other, stages compute what the model computes."""

import random
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from graph_models import (
    Mlp,
    ParallelMlp,
    RandomDag,
    ResNet,
    UNet,
    run_ranks,
    run_stages,
    trace,
)
from torch import nn
from torch.utils import _pytree as pytree

from parallel.errors import ConfigError
from parallel.graph import Collective, Graph, Piece, Stage, Value, shared_weights
from parallel.graph_modules import cut_at
from runner.compiler.segment import Segment, TensorSpec


@torch.no_grad()
def expected(module: nn.Module, *inputs: torch.Tensor) -> list[torch.Tensor]:
    leaves: list[torch.Tensor] = pytree.tree_leaves(module.eval()(*(x.clone() for x in inputs)))
    return leaves


def assert_equal(found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> None:
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def assert_stages_fit(stages: Sequence[Stage]) -> None:
    """What a stage receives is what the one before sends; pieces hold only what they use."""
    for before, after in pairwise(stages):
        assert before.sends == after.receives
    for stage in stages:
        for piece in stage.pieces:
            used = {node.target for node in piece.module.graph.nodes if node.op == "get_attr"}
            assert used == {name for name, _ in piece.weights()}


@pytest.mark.parametrize("seed", range(100))
def test_stages_of_a_random_model_compute_what_it_computes(seed: int) -> None:
    module = RandomDag(seed).double()
    inputs = torch.randn(2, 5, 6, dtype=torch.float64).unbind()
    graph = trace(module, *inputs)
    wanted = expected(module, *inputs)
    with torch.no_grad():
        assert_equal(graph.module(*inputs), wanted)
    pick = random.Random(seed)
    for num_stages in range(1, min(5, len(graph.units)) + 1):
        boundaries = sorted(pick.sample(range(1, len(graph.units)), num_stages - 1))
        stages = graph.stages(boundaries)
        assert_stages_fit(stages)
        assert_equal(run_stages(graph, stages, *inputs), wanted)
        for boundary, stage in zip(boundaries, stages[1:], strict=True):
            assert graph.boundary_bytes[boundary] == sum(v.num_bytes for v in stage.receives)
            assert graph.carries(boundary) == stage.receives


@pytest.mark.parametrize(
    ("points", "sends"),
    [
        (["down.2", "up.1"], [[(4, 16, 16), (8, 8, 8), (8, 4, 4)], [(4, 16, 16), (16, 8, 8)]]),
        (
            ["down.1", "middle", "up.1"],
            [
                [(4, 16, 16), (4, 8, 8)],
                [(4, 16, 16), (8, 8, 8), (16, 4, 4), (16, 2, 2)],
                [(4, 16, 16), (16, 8, 8)],
            ],
        ),
    ],
)
def test_skip_connections_are_relayed_by_the_stages_between(
    points: list[str], sends: list[list[tuple[int, ...]]]
) -> None:
    module, image = UNet(), torch.randn(2, 2, 16, 16)
    graph = trace(module, image)
    stages = graph.stages(cut_at(graph, points))
    assert_stages_fit(stages)
    assert [[value.shape[1:] for value in stage.sends] for stage in stages[:-1]] == sends
    torch.testing.assert_close(run_stages(graph, stages, image), tuple(expected(module, image)))


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (ResNet(), (2, 3, 8, 8)),
        (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (2, 3, 8)),
        (nn.LSTM(4, 4, num_layers=2), (5, 2, 4)),
    ],
    ids=["resnet", "transformer", "lstm"],
)
@pytest.mark.filterwarnings("ignore:.*_flat_weights")
def test_every_cut_of_known_models(module: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    graph = trace(module, x)
    wanted = tuple(expected(module, x))
    for boundary in range(1, len(graph.units)):
        stages = graph.stages([boundary])
        torch.testing.assert_close(run_stages(graph, stages, x), wanted)
    # Of the program that export makes of it, the graph is the same, with the same names.
    program = torch.export.export(module.eval(), (x,), strict=False)
    again = trace(program.module(), x)
    assert [unit.name for unit in again.units] == [unit.name for unit in graph.units]


def test_units_are_runs_of_operations_of_one_module() -> None:
    x = torch.randn(1, 3, 8, 8)
    graph = trace(ResNet(num_blocks=1), x)
    block = ["conv1", "bn1", "relu", "conv2", "bn2", "", "relu"]
    wanted = ["stem", "(root)", *(f"layers.0.{name}".strip(".") for name in block), "(root)", "fc"]
    assert [unit.name for unit in graph.units] == wanted
    atomic = trace(ResNet(num_blocks=1), x, atomic=["layers.0"])
    assert [u.name for u in atomic.units] == ["stem", "(root)", "layers.0", "(root)", "fc"]
    assert [u.start for u in atomic.units[1:]] == [u.stop for u in atomic.units[:-1]]
    assert "dropout" in graph.module_names


def test_pieces_can_be_compiled_as_segments() -> None:
    module, image = UNet(), torch.randn(1, 2, 16, 16)
    graph = trace(module, image)
    known = {"x0": image}
    for stage in graph.stages(cut_at(graph, ["down.1", "up.0"])):
        for piece in stage.pieces:
            specs = tuple(TensorSpec(value.shape, value.torch_dtype) for value in piece.inputs)
            segment = Segment("piece", piece.module, specs)
            assert list(segment.weights) == [name for name, _ in piece.weights()]
            inputs = [known[value.name] for value in piece.inputs]
            weights = [tensor.detach() for _, tensor in piece.weights()]
            results = segment.export("cpu").module()(*inputs, *weights)
            known |= {v.name: t for v, t in zip(piece.outputs, results, strict=True)}
    torch.testing.assert_close(known[graph.outputs[0].name], expected(module, image)[0])


def test_weights_keep_their_names_and_identity() -> None:
    module, x = Mlp(), torch.randn(2, 8)
    graph = trace(module, x)
    stages = graph.stages(cut_at(graph, ["blocks.1", "head"]))
    held = [name for stage in stages for name in stage.weights]
    assert sorted(held) == sorted(name for name, _ in module.named_parameters())
    for stage in stages:
        for name, tensor in stage.weights.items():
            assert tensor is module.get_parameter(name)
    assert not shared_weights(stages)


def test_shared_weights_are_found_by_name_and_by_storage() -> None:
    module = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    module[2].weight = module[0].weight
    module[3].weight = nn.Parameter(module[1].weight.detach())
    graph = trace(module, torch.randn(2, 4))
    stages = graph.stages([1, 2, 3])
    assert shared_weights(stages) == {"0.weight": (0, 2), "1.weight": (1, 3)}


def test_constants_are_named_after_their_contents() -> None:
    class Scaled(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * torch.tensor([float(len(x)), 1.0]) + torch.tensor([3.0, 4.0])

    names = [set(trace(Scaled(), torch.randn(n, 2)).stages()[0].weights) for n in (2, 3, 2)]
    assert names[0] == names[2]
    assert len(names[0] & names[1]) == 1


def test_meta_weights_are_traced_and_kept() -> None:
    with torch.device("meta"):
        module = ResNet()
    module.train()
    weights = dict(module.named_parameters())
    graph = trace(module, torch.randn(1, 3, 8, 8))
    real = trace(ResNet(), torch.randn(1, 3, 8, 8))
    assert str(graph.module.graph) == str(real.module.graph)
    assert dict(module.named_parameters()).keys() == weights.keys()
    assert all(tensor is weights[name] for name, tensor in module.named_parameters())
    held = dict(graph.stages()[0].weights)
    assert all(held[name] is tensor for name, tensor in weights.items())
    assert module.training
    assert module.layers[0].bn1.training


def test_tracing_takes_no_memory_for_activations() -> None:
    module = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Flatten())
    values = [Value("image", "float32", (4096, 3, 4096, 4096))]
    assert Graph.trace(module, values).outputs[0].num_bytes > 1e12


def test_operations_run_on_the_device_asked_for() -> None:
    class Positions(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            ramp = torch.arange(3, device=x.device) + torch.zeros(3)
            return x + ramp.to(x.device)

    graph = Graph.trace(Positions(), [Value("x", "float32", (2, 3))], device="meta")
    assert graph.module(torch.empty(2, 3, device="meta"))[0].is_meta
    assert trace(Positions(), torch.ones(2, 3)).module(torch.ones(2, 3))[0].sum() == 12


class Turn(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.t()


def test_layouts_of_received_tensors_do_not_matter() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.turn, self.linear = Turn(), nn.Linear(12, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            # A view of the traced layout; what a stage receives is laid out in another way.
            return self.linear(self.turn(x).t().view(-1))

    module, x = Turned(), torch.randn(3, 4)
    graph = trace(module, x)
    assert [unit.name for unit in graph.units] == ["turn", "(root)", "linear"]
    found = run_stages(graph, graph.stages([1, 2]), x)
    torch.testing.assert_close(found, tuple(expected(module, x)))


def test_a_value_that_needs_a_layout_is_refused_or_made_to_have_it() -> None:
    class Strided(nn.Module):
        def __init__(self, turn: bool) -> None:
            super().__init__()
            self.turn, self.linear = turn, nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.linear(x)
            return (x.t() if self.turn else x).as_strided((2, 2), (1, 4))

    x = torch.randn(4, 4)
    found = trace(Strided(False), x).module(x)
    assert found[0].shape == (2, 2)
    with pytest.raises(ConfigError, match=r"as_strided reads .* by its place in memory"):
        trace(Strided(True), x)


@pytest.mark.parametrize("points", [[], ["blocks.1"], ["blocks.0.down", "head"]])
def test_collectives_split_a_stage_and_ranks_agree(points: list[str]) -> None:
    whole, x = Mlp(), torch.randn(3, 8)
    graphs = [trace(ParallelMlp(whole, rank, 2), x) for rank in range(2)]
    stages = [graph.stages(cut_at(graph, points)) for graph in graphs]
    for found in run_ranks(graphs[0], stages, x):
        torch.testing.assert_close(found[0], expected(whole, x)[0])
    kinds = [s.kind for stage in stages[0] for s in stage.steps if isinstance(s, Collective)]
    assert kinds == ["all_reduce", "all_reduce", "all_gather"]
    for stage in stages[0]:
        for piece in stage.pieces:
            assert "_c10d" not in piece.module.code
        assert all(isinstance(step, Piece | Collective) for step in stage.steps)


def test_a_twin_has_the_units_of_the_model() -> None:
    whole, x = Mlp(), torch.randn(3, 8)
    atomic = ["blocks.0", "blocks.1", "head"]
    names = [
        [unit.name for unit in trace(module, x, atomic=atomic).units]
        for module in (whole, ParallelMlp(whole, 1, 2))
    ]
    assert [name for name in names[1] if name != "(root)"] == [n for n in names[0] if n != "(root)"]


@pytest.mark.parametrize("boundaries", [[0], [2, 2], [3, 1], [99]])
def test_boundaries_that_make_no_stages_are_refused(boundaries: list[int]) -> None:
    graph = trace(Mlp(), torch.randn(2, 8))
    with pytest.raises(ConfigError, match="use ascending numbers from 1 to"):
        graph.stages(boundaries)
