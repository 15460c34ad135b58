"""Where to cut a graph by the modules that a user names.

Each function returns boundaries, the units with which the stages after the first begin. The cut by
cost is `parallel.graph_cut`.
"""

import difflib
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise

from parallel.errors import ConfigError
from parallel.graph import Graph
from parallel.partition import Unit, matching

Boundaries = tuple[int, ...]


def cut_at(graph: Graph, split_points: Sequence[str]) -> Boundaries:
    """The cut before each of the modules named: a stage begins with the first operation in it.

    Raises:
        ConfigError: a module that does not run, that is first in the model, or out of order.
    """
    boundaries: list[int] = []
    for point in split_points:
        start = _first_unit_in(graph, point)
        if start == 0:
            raise ConfigError(
                f"split point {point} is the first module that runs, so the stage before it would "
                "be empty; leave it out"
            )
        if boundaries and start <= boundaries[-1]:
            raise ConfigError(
                f"split point {point} does not begin after {split_points[len(boundaries) - 1]}; "
                "list split points in the order in which the model runs"
            )
        boundaries.append(start)
    return tuple(boundaries)


def split_points(graph: Graph) -> dict[int, str]:
    """The boundaries that `cut_at` can make, each with the outermost module that names it."""
    found: dict[int, str] = {}
    seen: set[str] = set()
    for index, unit in enumerate(graph.units):
        first = [path for path in _paths(unit.name) if path not in seen]
        if index and first and unit.name != "(root)":
            found[index] = first[0]
        seen.update(first)
    return found


def cut_by_modules(graph: Graph, stages: Sequence[Sequence[str]]) -> Boundaries:
    """The cut that a user wrote: for each stage a list of patterns of modules.

    A pattern is one of `parallel.partition`: `*` stands for one dotted segment, `{a..b}` for the
    numbers a to b. It covers a module and all in it; where several cover a module, that of the
    module nearest to it holds, and of those the one with the fewest width. Operations between
    the named modules, such as an addition in the model's own `forward`, stay with the stage before.
    So do later calls of a module without weights.

    Raises:
        ConfigError: a pattern that matches nothing, a module in two stages or in none, modules out
            of order, or a stage without any.
    """
    owners = list(_owners(graph, _named(graph, stages)))
    for stage, patterns in enumerate(stages):
        if stage not in owners:
            raise ConfigError(
                f"parallel.stages: stage {stage} ({', '.join(patterns)}) has no operation; give it "
                "a module that computes something"
            )
    return tuple(owners.index(stage) for stage in range(1, len(stages)))


def _first_unit_in(graph: Graph, point: str) -> int:
    for index, unit in enumerate(graph.units):
        if point in _paths(unit.name):
            return index
    names = sorted({path for unit in graph.units for path in _paths(unit.name)})
    near = difflib.get_close_matches(point, names, n=1, cutoff=0.0)
    raise ConfigError(
        f"split point {point!r} is no module that computes something; the nearest is {near[0]}"
    )


def _paths(name: str) -> list[str]:
    """A module's name and those of all that it is in, outermost first."""
    return list(accumulate(name.split("."), "{}.{}".format))


def _named(graph: Graph, stages: Sequence[Sequence[str]]) -> dict[str, int]:
    """Module -> stage, for the modules that a pattern matches."""
    running = (path for unit in graph.units for path in _paths(unit.name) if path != "(root)")
    names = [Unit(name, name, 0) for name in dict.fromkeys((*running, *graph.module_names))]
    found: dict[str, tuple[int, int]] = {}  # module -> (how wide its pattern is, stage)
    for stage, patterns in enumerate(stages):
        for pattern in patterns:
            width = 2 * pattern.count("*") + pattern.count("{")
            for unit in matching(names, pattern, stage):
                before = found.setdefault(unit.name, (width, stage))
                if before[0] == width and before[1] != stage:
                    raise ConfigError(
                        f"parallel.stages: module {unit.name} is in stage {before[1]} and again in "
                        f"stage {stage} ({pattern}); list it once"
                    )
                found[unit.name] = min(before, (width, stage))
    return {name: stage for name, (_, stage) in found.items()}


def _owners(graph: Graph, named: dict[str, int]) -> Iterator[int]:
    """The stage of each unit; ascending."""
    calls = Counter(unit.name for unit in graph.units)
    containers = {path for unit in graph.units for path in _paths(unit.name)[:-1]}
    wanted: list[int | None] = []
    is_free: list[bool] = []
    for unit in graph.units:
        within = [named[path] for path in _paths(unit.name) if path in named]
        between = unit.name == "(root)" or unit.name in containers
        if not within and not between:
            raise ConfigError(f"parallel.stages: module {unit.name} is in no stage; add it to one")
        wanted.append(within[-1] if within else None)
        is_free.append(not within or (not unit.weight_bytes and (between or calls[unit.name] > 1)))
    return _in_order(graph, wanted, is_free)


def _in_order(graph: Graph, wanted: Sequence[int | None], is_free: Sequence[bool]) -> Iterator[int]:
    """The stages wanted, with those units that are free to move put where the order allows it."""
    fixed = zip(graph.units, wanted, is_free, strict=True)
    bound = [(unit.name, w) for unit, w, free in fixed if not free and w is not None]
    for (before, owner), (after, later) in pairwise(bound):
        if later < owner:
            raise ConfigError(
                f"parallel.stages: {after} runs after {before} but is in stage {later}, before "
                f"stage {owner}; a stage is a contiguous run of modules in the model's order"
            )
    stages = [owner for _, owner in bound]
    current = passed = 0
    for stage, free in zip(wanted, is_free, strict=True):
        if not free:
            current = stages[passed]
            passed += 1
        elif stage is not None:
            current = max(current, min([stage, *stages[passed : passed + 1]]))
        yield current
