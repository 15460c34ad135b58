"""What is traced: outputs of all forms by name, and refusals that say what is wrong."""

from collections.abc import Callable

import pytest
import torch
from graph_models import trace
from torch import nn

from parallel.errors import ConfigError
from parallel.graph import Graph, Value

_c10d = torch.ops._c10d_functional
X = torch.randn(2, 4)


class Call(nn.Module):
    """A model whose `forward` is a function of one tensor."""

    def __init__(self, function: Callable[[torch.Tensor], object]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> object:
        return self.function(x)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.steps += 1
        return x + self.steps


def branching(x: torch.Tensor) -> torch.Tensor:
    return x if x.sum() > 0 else x + 1


def cond(x: torch.Tensor) -> torch.Tensor:
    return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (branching, r"depends on the values of its inputs \(in branching, test_graph_trace.py"),
        (lambda x: x.nonzero() + 1, r"shape of what aten\.nonzero.* returns depends on the values"),
        (lambda x: x[x > 0] * 2, r"shape of what aten\.index.* returns depends on the values"),
        (lambda x: x * x.sum().item(), r"reads a number out of a tensor \(aten\.item"),
        (lambda x: torch.from_numpy(x.numpy()), r"RuntimeError: \.numpy\(\) is not supported"),
        (lambda x: (x + 1, None), r"the model's output_1 is None; return tensors only"),
        (lambda x: {"a": x + 1, "n": [x, 3]}, r"the model's n_1 is 3; return tensors only"),
        (lambda x: {"a": [x + 1], "a_0": x}, r"two outputs named a_0"),
        (lambda x: x @ x, r"must have same reduction dim.* \(in <lambda>, test_graph_trace.py"),
        (lambda x: x + torch.rand(4), r"draws random numbers \(aten\.rand"),
        (cond, r"uses cond, which holds code of its own"),
        (lambda x: x, r"computes nothing"),
        (lambda x: _c10d.all_reduce(x * 2, "sum", "g"), r"not followed by one wait_tensor"),
        (
            lambda x: _c10d.wait_tensor(_c10d.all_reduce(x * 2, "max", "g")),
            r"all_reduce.* makes the max; stages run only sums",
        ),
        (
            lambda x: _c10d.wait_tensor(_c10d.reduce_scatter_tensor(x * 2, "sum", 2, "g")),
            r"reduce_scatter_tensor.* is a collective that stages cannot run",
        ),
    ],
)
def test_refusals(function: Callable[[torch.Tensor], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        trace(Call(function), X)
    assert "\n" not in str(caught.value)


def test_a_model_that_keeps_state_is_refused() -> None:
    with pytest.raises(ConfigError, match="changes its buffer steps when it runs"):
        trace(Counting(), X)


def test_inputs_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"with inputs x0 float32\[2, 4\], x1 float32\[2, 4\]"):
        trace(nn.Linear(4, 4), X, X)
    with pytest.raises(ConfigError, match="x has dtype 'floaty', which torch lacks"):
        Graph.trace(nn.Linear(4, 4), [Value("x", "floaty", (2, 4))])
    with pytest.raises(ConfigError, match="two inputs have one name in x, x"):
        Graph.trace(nn.Bilinear(4, 4, 4), [Value("x", "float32", (2, 4))] * 2)


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (lambda x: x + 1, ("output",)),
        (lambda x: (x + 1, [x, x * 2]), ("output_0", "output_1_0", "output_1_1")),
        (lambda x: {"boxes": x + 1, "all": (x, x)}, ("boxes", "all_0", "all_1")),
    ],
)
def test_outputs_are_flattened_and_named(
    function: Callable[[torch.Tensor], object], names: tuple[str, ...]
) -> None:
    graph = trace(Call(function), X)
    assert graph.output_names == names
    assert len(graph.outputs) == len(names)


@pytest.mark.parametrize("name", ["self", "class", "input", "a.b", "1x", "add", "x 0"])
def test_inputs_may_have_any_name(name: str) -> None:
    values = [Value(name, "float32", (2, 4)), Value("a_b", "float32", (2, 4))]

    class Sum(nn.Module):
        def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
            return torch.relu(first + second) - second

    graph = Graph.trace(Sum(), values)
    (stage,) = graph.stages()
    assert [value.name for value in stage.receives] == [name, "a_b"]
    assert len({value.name for value in (*stage.receives, *stage.sends)}) == 3
    piece = stage.pieces[0]
    given = {name: X, "a_b": -2 * X}
    found = piece.module(*(given[value.name] for value in piece.inputs))[0]
    torch.testing.assert_close(found, torch.relu(-X) + 2 * X)


def test_inputs_written_in_place_stay_as_they_are() -> None:
    graph = trace(Call(lambda x: x.add_(1) * 2), X)
    before = X.clone()
    torch.testing.assert_close(graph.module(X)[0], (X + 1) * 2)
    torch.testing.assert_close(X, before)


def test_a_weight_may_be_an_output() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x + 1, self.weight

    module = Table()
    (stage,) = trace(module, X).stages()
    torch.testing.assert_close(stage.pieces[0].module(X)[1], module.weight)


def test_precision_of_autocast_is_kept() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.linear(x)

    assert trace(Mixed(), X).outputs[0].dtype == "bfloat16"
