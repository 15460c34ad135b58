"""What operations cost, worked out by hand and by torch's own counter."""

import pytest
import torch
import torch.nn.functional as F
from graph_models import ResNet, UNet, trace
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from parallel.graph import GraphUnit
from parallel.graph_cost import Cost, Machine


def unit_of(module: nn.Module, *inputs: torch.Tensor) -> GraphUnit:
    (unit,) = trace(module, *inputs).units
    return unit


def test_a_linear_layer() -> None:
    unit = unit_of(nn.Linear(16, 32).to(torch.bfloat16), torch.randn(4, 16, dtype=torch.bfloat16))
    assert unit.flops == 2 * 4 * 16 * 32
    assert unit.weight_bytes == 2 * (16 * 32 + 32)
    assert unit.num_bytes == unit.weight_bytes + 2 * (4 * 16 + 4 * 32)
    assert unit.costs[0].is_half


class Attention(nn.Module):
    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v)


class Einsum(nn.Module):
    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bij,bjk->bik", a, b)


class Product(nn.Module):
    def forward(self, a: torch.Tensor) -> torch.Tensor:
        return a @ a


@pytest.mark.parametrize(
    ("module", "shapes"),
    [
        (ResNet(), [(2, 3, 8, 8)]),
        (UNet(), [(2, 2, 16, 16)]),
        (nn.Conv2d(8, 6, 3, groups=2, stride=2), [(2, 8, 9, 9)]),
        (nn.ConvTranspose2d(8, 6, 3, groups=2, stride=2), [(2, 8, 9, 9)]),
        (nn.Conv1d(3, 5, 4), [(2, 3, 20)]),
        (nn.Conv3d(3, 5, 2), [(2, 3, 4, 5, 6)]),
        (Attention(), [(2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 6)]),
        (Einsum(), [(2, 3, 4), (2, 4, 5)]),
        (Product(), [(3, 3)]),
        (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), [(2, 3, 8)]),
        (nn.LSTM(4, 6), [(5, 2, 4)]),
    ],
)
def test_products_are_counted_as_torch_counts_them(
    module: nn.Module, shapes: list[tuple[int, ...]]
) -> None:
    inputs = [torch.randn(shape) for shape in shapes]
    graph = trace(module, *inputs)
    counter = FlopCounterMode(display=False)
    # On the meta device torch takes no fused paths that its counter does not know.
    with counter, torch.no_grad():
        module.train().to("meta")(*(x.to("meta") for x in inputs))
    heads = [n for n in graph.module.graph.nodes if n.op == "call_function"]
    results = sum(n.meta["val"].numel() for n in heads if isinstance(n.meta["val"], torch.Tensor))
    flops = sum(unit.flops for unit in graph.units)
    assert counter.get_total_flops() <= flops <= counter.get_total_flops() + 2 * results


def test_views_cost_nothing_and_look_ups_what_they_return() -> None:
    view = unit_of(nn.Flatten(), torch.randn(2, 3, 4))
    assert (view.num_bytes, view.seconds(Machine())) == (0, 0)
    table = unit_of(nn.Embedding(100_000, 8), torch.zeros(4, dtype=torch.int64))
    assert table.num_bytes == 2 * 4 * 8 * 4
    assert table.weight_bytes == 100_000 * 8 * 4


def test_time_is_that_of_the_lower_roof() -> None:
    machine = Machine(half_flops_per_s=1e9, single_flops_per_s=1e8, bytes_per_s=1e6, operation_s=1)
    assert Cost(10**10, 1, is_half=True).seconds(machine) == 10
    assert Cost(10**10, 1, is_half=False).seconds(machine) == 100
    assert Cost(1, 10**8, is_half=True).seconds(machine) == 100
    assert Cost(1, 1, is_half=True).seconds(machine) == 1
    assert machine.send_seconds(0) == 0
    assert Machine(link_bytes_per_s=1e6, link_s=1).send_seconds(10**6) == 2
