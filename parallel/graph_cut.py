"""Where to cut a graph so that its slowest stage is fastest, and what to warn of.

A cut is given by its boundaries, the units with which the stages after the first begin; what makes
stages of them is `Graph.stages`. Cuts that the user names are `parallel.graph_modules`.
"""

from collections.abc import Collection, Sequence
from itertools import accumulate, pairwise

import torch

from parallel.errors import ConfigError
from parallel.graph import Graph
from parallel.graph_cost import Machine
from parallel.graph_modules import Boundaries, cut_at, cut_by_modules

__all__ = ["Boundaries", "cut_at", "cut_by_cost", "cut_by_modules", "cut_warnings"]


def cut_by_cost(
    graph: Graph,
    tp_sizes: Sequence[int],
    times: Sequence[float] | None = None,
    machine: Machine | None = None,
    allowed: Collection[int] | None = None,
) -> Boundaries:
    """The cut whose slowest stage is fastest; of several such, the one that sends the least.

    A stage takes the time of its units over its tensor-parallel size, and that of sending what
    lives at its end. Exact, by dynamic programming over the cut points.

    Args:
        tp_sizes: one for each stage.
        times: measured seconds of each unit; None: estimated for `machine`.
        allowed: the only units with which a stage after the first may begin; None: any.

    Raises:
        ConfigError: more stages than units, or than may begin somewhere.
    """
    if len(tp_sizes) > len(graph.units):
        raise ConfigError(
            f"pipeline_parallel_size={len(tp_sizes)} exceeds the {len(graph.units)} parts that the "
            f"model can be cut into; use 1 to {len(graph.units)}"
        )
    if allowed is not None and len(tp_sizes) > len(allowed) + 1:
        raise ConfigError(
            f"pipeline_parallel_size={len(tp_sizes)} needs {len(tp_sizes) - 1} places to cut at, "
            f"and of those that are allowed there are {len(allowed)}; use 1 to {len(allowed) + 1}"
        )
    machine = machine or Machine()
    ends = _row([0.0, *accumulate(unit_seconds(graph, times, machine))])
    sends = _row([*(machine.send_seconds(n) for n in graph.boundary_bytes), 0.0])
    if allowed is not None:
        closed = [place for place in range(1, len(graph.units)) if place not in allowed]
        sends[closed] = torch.inf
    slowest, _ = _best_path(ends, sends, tp_sizes, limit=None)
    # The sums of two equal cuts differ in their last digits.
    return _best_path(ends, sends, tp_sizes, limit=slowest * (1 + 1e-9))[1]


def _best_path(
    ends: torch.Tensor, sends: torch.Tensor, tp_sizes: Sequence[int], *, limit: float | None
) -> tuple[float, Boundaries]:
    """The cut with the least time of its slowest stage, or the least time to send all carries.

    Args:
        ends: (num_units + 1,) seconds of all units before each, and of all.
        sends: (num_units + 1,) seconds to send what lives at each unit's beginning, and at the end.
        limit: what no stage may exceed; then sending counts, else the slowest stage.

    Returns:
        that time, and the cut.
    """
    # spans[j, i]: seconds of the units from i to before j, which must be one or more
    spans = ends[:, None] - ends
    spans.masked_fill_(torch.ones_like(spans, dtype=torch.bool).triu(), torch.inf)
    best = torch.full_like(ends, torch.inf)
    best[0] = 0.0
    choices, stage = [], torch.empty_like(spans)
    for tp_size in tp_sizes:
        if limit is None:
            torch.div(spans, tp_size, out=stage).add_(sends[:, None])
            best, choice = torch.maximum(stage, best, out=stage).min(dim=1)
        else:
            is_slow = spans > ((limit - sends) * tp_size)[:, None]
            best, choice = stage.copy_(best).masked_fill_(is_slow, torch.inf).min(dim=1)
            best += sends
        choices.append(choice)
    end, boundaries = len(ends) - 1, []
    for choice in reversed(choices):
        end = int(choice[end])
        boundaries.append(end)
    return float(best[-1]), tuple(reversed(boundaries))[1:]


def _row(seconds: Sequence[float]) -> torch.Tensor:
    return torch.tensor(seconds, dtype=torch.float64)


def unit_seconds(
    graph: Graph, times: Sequence[float] | None, machine: Machine
) -> tuple[float, ...]:
    """The times of all units: those measured, or an estimate."""
    if times is None:
        return tuple(unit.seconds(machine) for unit in graph.units)
    if len(times) != len(graph.units):
        raise ValueError(f"{len(times)} times for {len(graph.units)} units")
    return tuple(times)


def cut_warnings(
    graph: Graph,
    boundaries: Sequence[int],
    tp_sizes: Sequence[int],
    times: Sequence[float] | None = None,
    machine: Machine | None = None,
) -> tuple[str, ...]:
    """A line for each boundary whose carries take longer to send than a cut saves.

    What a cut saves is what all stages take, less the slowest of them, over the number of cuts.
    """
    if not boundaries:
        return ()
    machine = machine or Machine()
    seconds = unit_seconds(graph, times, machine)
    ends = pairwise([0, *boundaries, len(graph.units)])
    stages = [sum(seconds[a:b]) / size for (a, b), size in zip(ends, tp_sizes, strict=True)]
    saved = (sum(stages) - max(stages)) / len(boundaries)
    return tuple(
        _warning(graph, boundary, machine.send_seconds(graph.boundary_bytes[boundary]), saved)
        for boundary in boundaries
        if machine.send_seconds(graph.boundary_bytes[boundary]) > saved
    )


def _warning(graph: Graph, boundary: int, sending: float, saved: float) -> str:
    carries = ", ".join(map(str, graph.carries(boundary)))
    return (
        f"the cut before {graph.units[boundary].name} sends {carries} "
        f"({graph.boundary_bytes[boundary] / 1e6:.3g} MB), which takes {1e6 * sending:.3g} us, but "
        f"a cut saves {1e6 * saved:.3g} us; use fewer stages or cut elsewhere"
    )
