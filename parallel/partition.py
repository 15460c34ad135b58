"""The cut of a model into pipeline stages: chosen by cost, or checked where the user gives it.

Pure. A model is a row of units (embedding, layers, norm, head) that run one after the other; a
stage is a contiguous piece of that row.
"""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from parallel.errors import ConfigError


@dataclass(frozen=True)
class Unit:
    """The smallest piece that a cut can move.

    Attributes:
        name: the module's name in the checkpoint, such as "model.layers.7"; what a user writes.
        module: its name in the stage module, such as "layers.7".
        cost: bytes of weights that one decoding step reads; an embedding is looked up, not read,
            and costs nothing.
    """

    name: str
    module: str
    cost: int


RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")

Cut = tuple[tuple[Unit, ...], ...]
"""The units of each stage."""


def cut_by_cost(units: Sequence[Unit], tp_sizes: Sequence[int]) -> Cut:
    """The contiguous cut whose slowest stage is fastest, a stage's time being its cost over its
    tensor-parallel size.

    Every stage gets at least one unit that costs something. Exact, by dynamic programming over the
    cut points.

    Raises:
        ConfigError: more stages than units that cost something.
    """
    num_stages = len(tp_sizes)
    costly = sum(unit.cost > 0 for unit in units)
    if num_stages > costly:
        raise ConfigError(
            f"pipeline_parallel_size={num_stages} exceeds the {costly} modules that can be a "
            f"stage; "
            f"use 1 to {costly}"
        )
    prefix = [0]
    for unit in units:
        prefix.append(prefix[-1] + unit.cost)

    # best[end] = (time of the slowest stage so far, cut points so far) for the first `end` units
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, (0,))}
    for tp_size in tp_sizes:
        best = {
            end: min(
                (max(time, (prefix[end] - prefix[start]) / tp_size), (*points, end))
                for start, (time, points) in best.items()
                if start < end and prefix[end] > prefix[start]
            )
            for end in range(1, len(units) + 1)
            if any(start < end and prefix[end] > prefix[start] for start in best)
        }
    _, points = best[len(units)]
    return tuple(tuple(units[a:b]) for a, b in pairwise(points))


def cut_by_patterns(units: Sequence[Unit], stages: Sequence[Sequence[str]]) -> Cut:
    """The cut that a user wrote: for each stage a list of patterns of unit names.

    In a pattern `*` stands for one dotted segment and `{a..b}` for the numbers a to b, both
    included.

    Raises:
        ConfigError: a pattern that matches nothing, a module in two stages or in none, or modules
            out of order.
    """
    owner: dict[str, int] = {}
    for stage, patterns in enumerate(stages):
        for pattern in patterns:
            for unit in matching(units, pattern, stage):
                if unit.name in owner:
                    raise ConfigError(
                        f"parallel.stages: module {unit.name} is in stage {owner[unit.name]} and "
                        f"again in stage "
                        f"{stage} ({pattern}); list it once"
                    )
                owner[unit.name] = stage
    for unit in units:
        if unit.name not in owner:
            raise ConfigError(f"parallel.stages: module {unit.name} is in no stage; add it to one")
    for before, after in pairwise(units):
        if owner[after.name] < owner[before.name]:
            raise ConfigError(
                f"parallel.stages: {after.name} runs after {before.name} but is in stage "
                f"{owner[after.name]}, before "
                f"stage {owner[before.name]}; a stage is a contiguous run of modules in the "
                f"model's order"
            )
    return tuple(tuple(u for u in units if owner[u.name] == s) for s in range(len(stages)))


def matching(units: Sequence[Unit], pattern: str, stage: int) -> list[Unit]:
    matches = [unit for unit in units if covers(pattern, unit.name)]
    if not matches:
        near = difflib.get_close_matches(pattern, [unit.name for unit in units], n=1, cutoff=0.0)
        raise ConfigError(
            f"parallel.stages: {pattern!r} of stage {stage} matches no module; the modules "
            f"run from {units[0].name} to {units[-1].name}, the nearest is {near[0]}"
        )
    end_of_range = RANGE.sub(lambda numbers: numbers[2], pattern)
    if not any(covers(end_of_range, unit.name) for unit in units):
        raise ConfigError(
            f"parallel.stages: {pattern!r} of stage {stage} goes beyond {matches[-1].name}, the "
            "last module of that name; end the range there"
        )
    return matches


def covers(pattern: str, name: str) -> bool:
    segments, parts = name.split("."), re.split(r"\.(?![^{]*\})", pattern)
    return len(segments) == len(parts) and all(map(_segment_covers, parts, segments))


def _segment_covers(part: str, segment: str) -> bool:
    if numbers := RANGE.fullmatch(part):
        return segment.isdigit() and int(numbers[1]) <= int(segment) <= int(numbers[2])
    return part in ("*", segment)
