"""Split points by name: every boundary that has one, and cuts by cost among those alone."""

from itertools import combinations, pairwise

import pytest
import torch
from graph_models import RandomDag, UNet, trace

from parallel.errors import ConfigError
from parallel.graph import Graph
from parallel.graph_cost import Machine
from parallel.graph_cut import cut_by_cost
from parallel.graph_modules import cut_at, split_points

FREE = Machine(link_s=0.0, link_bytes_per_s=float("inf"))


def unet() -> Graph:
    return trace(UNet().eval(), torch.zeros(1, 2, 32, 32))


def nameable(graph: Graph) -> set[int]:
    """The boundaries that `cut_at` makes of any path in the model."""
    found = set()
    for path in {p for unit in graph.units for p in _paths(unit.name)} - {"(root)"}:
        try:
            found.update(cut_at(graph, [path]))
        except ConfigError:
            continue  # It begins with the model.
    return found


def _paths(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


def test_every_boundary_that_a_path_makes_has_a_name_and_no_other() -> None:
    for seed in range(4):
        graph = trace(RandomDag(seed).eval(), torch.zeros(3, 6), torch.zeros(3, 6))
        assert set(split_points(graph)) == nameable(graph)
    assert set(split_points(unet())) == nameable(unet())


def test_a_name_makes_its_boundary_again() -> None:
    graph = unet()
    names = split_points(graph)
    assert all(cut_at(graph, [name]) == (boundary,) for boundary, name in names.items())
    assert "up" in names.values(), "the outermost module of those that begin there"
    repeated = [i for i, unit in enumerate(graph.units) if unit.name in ("pool", "(root)")]
    assert sum(index in names for index in repeated) == 1, "of three calls the first has a name"


def test_a_cut_by_cost_keeps_to_what_is_allowed() -> None:
    graph = unet()
    times = [1e-3 * (1 + index % 5) for index in range(len(graph.units))]
    allowed = [3, 4, 9]

    def slowest(cut: tuple[int, ...]) -> float:
        return max(sum(times[a:b]) for a, b in pairwise([0, *cut, len(times)]))

    found = cut_by_cost(graph, [1, 1, 1], times=times, machine=FREE, allowed=allowed)
    assert set(found) <= set(allowed)
    assert slowest(found) == pytest.approx(min(map(slowest, combinations(allowed, 2))))
    free = cut_by_cost(graph, [1, 1, 1], times=times, machine=FREE)
    assert slowest(free) < slowest(found), "or else nothing was forbidden"


def test_too_few_allowed_places_are_an_error() -> None:
    graph = unet()
    assert cut_by_cost(graph, [1, 1], allowed=[5]) == (5,)
    with pytest.raises(ConfigError, match=r"pipeline_parallel_size=3 needs 2 places .* use 1 to 2"):
        cut_by_cost(graph, [1, 1, 1], allowed=[5])
