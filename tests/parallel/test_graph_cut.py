"""Cuts of a graph: by cost they are the best there is, by hand they are checked."""

import time
from itertools import combinations, pairwise
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from graph_models import RandomDag, ResNet, UNet, trace
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from parallel.errors import ConfigError
from parallel.graph import Graph
from parallel.graph_cost import Machine
from parallel.graph_cut import cut_by_cost, cut_warnings
from parallel.graph_modules import cut_at, cut_by_modules

SLOW_LINK = Machine(link_bytes_per_s=1e6, link_s=1e-5)


def row(boundary_bytes: list[int]) -> Graph:
    """What a cut by cost looks at: as many units as given, and what lives before each."""
    return cast(Graph, SimpleNamespace(units=boundary_bytes, boundary_bytes=boundary_bytes))


def stage_seconds(
    graph: Graph, cut: tuple[int, ...], sizes: list[int], times: list[float], machine: Machine
) -> list[float]:
    """Time of each stage, as the documentation says it."""
    ends = [0, *cut, len(times)]
    sends = [machine.send_seconds(graph.boundary_bytes[b]) for b in cut]
    spans = [sum(times[a:b]) / n for (a, b), n in zip(pairwise(ends), sizes, strict=True)]
    return [span + send for span, send in zip(spans, [*sends, 0.0], strict=True)]


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_a_cut_by_cost_is_the_best_cut_there_is(data: st.DataObject) -> None:
    num_units = data.draw(st.integers(1, 9))
    whole = st.lists(st.integers(0, 20), min_size=num_units, max_size=num_units)
    times = [1e-5 * number for number in data.draw(whole)]
    graph = row([5 * number for number in data.draw(whole)])
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=min(4, num_units)))
    cut = cut_by_cost(graph, sizes, times=times, machine=SLOW_LINK)
    every = list(combinations(range(1, num_units), len(sizes) - 1))
    assert cut in every
    slowest = min(max(stage_seconds(graph, c, sizes, times, SLOW_LINK)) for c in every)
    found = max(stage_seconds(graph, cut, sizes, times, SLOW_LINK))
    assert found == pytest.approx(slowest, rel=1e-8, abs=1e-15)
    sending = [
        sum(SLOW_LINK.send_seconds(graph.boundary_bytes[b]) for b in c)
        for c in every
        if max(stage_seconds(graph, c, sizes, times, SLOW_LINK)) <= slowest * (1 + 1e-9)
    ]
    sent = sum(SLOW_LINK.send_seconds(graph.boundary_bytes[b]) for b in cut)
    assert sent == pytest.approx(min(sending), rel=1e-8, abs=1e-15)


def test_two_thousand_units_take_less_than_a_second() -> None:
    graph = row([n * 7919 % 1000 for n in range(2000)])
    start = time.process_time()
    cut_by_cost(graph, [1] * 8, times=[1e-5 * (n % 13) for n in range(2000)])
    assert time.process_time() - start < 1


def test_estimates_and_measured_times_decide_the_cut() -> None:
    module = nn.Sequential(*(nn.Linear(n, 64, bias=False) for n in (64,) * 8))
    graph = trace(module, torch.randn(4, 64))
    free = Machine(link_bytes_per_s=1e18, link_s=0)
    assert cut_by_cost(graph, [1, 1], machine=free) == (4,)
    assert cut_by_cost(graph, [3, 1], machine=free) == (6,)
    # Sending takes as long as five layers: better one layer before it than four.
    assert cut_by_cost(graph, [1, 1], machine=Machine(link_s=1e-5, operation_s=2e-6)) == (1,)
    assert cut_by_cost(graph, [1, 1], times=[7, 1, 1, 1, 1, 1, 1, 0]) == (1,)
    with pytest.raises(ConfigError, match=r"exceeds the 8 parts .* use 1 to 8"):
        cut_by_cost(graph, [1] * 9)


def test_a_cut_avoids_boundaries_with_many_carries() -> None:
    graph = trace(UNet(), torch.randn(2, 2, 64, 64))
    equal = [1e-4] * len(graph.units)
    (boundary,) = cut_by_cost(graph, [1, 1], times=equal, machine=SLOW_LINK)
    (balanced,) = cut_by_cost(graph, [1, 1], times=equal, machine=Machine())
    assert balanced == len(equal) // 2
    assert graph.boundary_bytes[boundary] < graph.boundary_bytes[balanced]


def test_a_cut_that_does_not_pay_is_warned_of() -> None:
    graph = trace(ResNet(), torch.randn(2, 3, 8, 8))
    cut = cut_at(graph, ["layers.2"])
    times = [1e-3] * len(graph.units)
    assert not cut_warnings(graph, cut, [1, 1], times=times)
    (line,) = cut_warnings(graph, cut, [1, 1], times=[t / 1e6 for t in times])
    assert "cut before layers.2.conv1 sends" in line
    assert "float32[2, 4, 4, 4] (0.000512 MB), which takes 10 us, but a cut saves" in line
    assert not cut_warnings(graph, (), [1])


def stage_names(graph: Graph, cut: tuple[int, ...]) -> list[list[str]]:
    ends = [0, *cut, len(graph.units)]
    return [[unit.name for unit in graph.units[a:b]] for a, b in pairwise(ends)]


def test_split_points_are_where_stages_begin() -> None:
    graph = trace(ResNet(num_blocks=2), torch.randn(2, 3, 8, 8))
    names = stage_names(graph, cut_at(graph, ["layers.1", "fc"]))
    assert names[1][0] == "layers.1.conv1"
    assert names[2] == ["fc"]
    assert cut_at(graph, []) == ()


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (["layers.9"], "'layers.9' is no module that computes something; the nearest is layers"),
        (["dropout"], "'dropout' is no module that computes something"),
        (["stem"], "stem is the first module that runs"),
        (["fc", "layers.1"], "layers.1 does not begin after fc"),
        (["layers.1", "layers.1.conv1"], "layers.1.conv1 does not begin after layers.1;"),
    ],
)
def test_split_points_are_checked(points: list[str], message: str) -> None:
    graph = trace(ResNet(num_blocks=2), torch.randn(2, 3, 8, 8))
    with pytest.raises(ConfigError, match=message):
        cut_at(graph, points)


def test_patterns_cover_modules_and_all_in_them() -> None:
    graph = trace(ResNet(), torch.randn(2, 3, 8, 8))
    cut = cut_by_modules(
        graph, [["stem", "layers.{0..1}"], ["layers.*", "dropout"], ["layers.3.relu", "fc"]]
    )
    first, second, third = stage_names(graph, cut)
    assert {name.split(".")[1] for name in first if "." in name} == {"0", "1"}
    assert first[:2] == ["stem", "(root)"]  # The relu after the stem is in no module.
    assert second[0] == "layers.2.conv1"
    assert third[-1] == "fc"
    whole = cut_by_modules(graph, [["stem", "layers", "fc"]])
    assert whole == ()


def test_modules_without_weights_may_be_called_in_several_stages() -> None:
    graph = trace(UNet(), torch.randn(2, 2, 16, 16))
    cut = cut_by_modules(graph, [["down", "pool"], ["middle", "grow", "up.0"], ["up", "head"]])
    assert [names[0] for names in stage_names(graph, cut)] == ["down.0.0", "middle.0", "up.1.0"]


def test_the_module_nearest_to_an_operation_decides() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
            self.tail = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.tail(self.body["b"](torch.relu(self.body["a"](x))))

    graph = trace(Nested(), torch.randn(2, 4))
    cut = cut_by_modules(graph, [["body"], ["body.b", "tail"], ["tail.1"]])
    assert stage_names(graph, cut) == [["body.a", "(root)"], ["body.b", "tail.0"], ["tail.1"]]


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([["stem", "layers"], ["classifier"]], "'classifier' of stage 1 matches no module; .*near"),
        ([["stem", "layers.{0..9}"], ["fc"]], "'layers.{0..9}' of stage 0 goes beyond layers.1"),
        ([["stem"], ["layers.*"]], "module fc is in no stage; add it to one"),
        ([["stem", "layers.*"], ["layers.*", "fc"]], "module layers.0 is in stage 0 and again in"),
        ([["stem", "fc"], ["layers"]], "fc runs after .* but is in stage 0, before stage 1"),
        ([["stem", "layers", "fc"], ["dropout"]], r"stage 1 \(dropout\) has no operation"),
    ],
)
def test_patterns_are_checked(stages: list[list[str]], message: str) -> None:
    graph = trace(ResNet(num_blocks=2), torch.randn(2, 3, 8, 8))
    with pytest.raises(ConfigError, match=message):
        cut_by_modules(graph, stages)


@pytest.mark.parametrize("seed", range(5))
def test_cuts_of_random_models_are_cuts(seed: int) -> None:
    x = torch.randn(5, 6)
    graph = trace(RandomDag(seed), x, x)
    for num_stages in range(1, len(graph.units) + 1):
        assert len(graph.stages(cut_by_cost(graph, [1] * num_stages))) == num_stages
