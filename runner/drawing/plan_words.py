"""The words for a plan that its text and its picture share."""

from collections.abc import Sequence

from parallel.decoder_plan import DecoderPlan
from parallel.fit import format_bytes
from parallel.graph_plan import GraphPlan
from parallel.plan import ShardPlan
from parallel.slicing import Range
from runner.drawing.words import plural


def headline(plan: ShardPlan) -> str:
    """What is planned, in a line."""
    weight_bytes = sum(rank.weight_bytes for rank in plan.ranks)
    return (
        f"{plan.architecture}, {plan.dtype}, {plural(len(plan.stages), 'stage')}, "
        f"{plural(len(plan.ranks), 'rank')}, {_limit(plan)}, "
        f"plan {plan.digest()[:12]}, weights {format_bytes(weight_bytes)} in all"
    )


def _limit(plan: ShardPlan) -> str:
    """How much at a time."""
    if isinstance(plan, DecoderPlan):
        return f"max_model_len {plan.max_model_len}"
    assert isinstance(plan, GraphPlan)
    return plural(len(plan.buckets), "bucket")


def condense(modules: Sequence[str]) -> list[str]:
    """Runs of numbered modules as one pattern each, as `parallel.stages` of the YAML takes them.

    >>> condense(["model.embed_tokens", "model.layers.0", "model.layers.1", "model.layers.2"])
    ['model.embed_tokens', 'model.layers.{0..2}']
    """
    runs: list[tuple[str, int, int] | tuple[str]] = []
    for module in modules:
        above, _, last = module.rpartition(".")
        if not last.isdecimal():
            runs.append((module,))
            continue
        number = int(last)
        match runs[-1:]:
            case [(prefix, first, stop)] if prefix == above and stop == number - 1:
                runs[-1] = (above, first, number)
            case _:
                runs.append((above, number, number))
    return [_pattern(*run) for run in runs]


def _pattern(prefix: str, first: int | None = None, last: int | None = None) -> str:
    if first is None:
        return prefix
    return f"{prefix}.{first}" if first == last else f"{prefix}.{{{first}..{last}}}"


def span(held: Range, *, present: bool = True) -> str:
    """A range with both its ends: `0..5`; `-` where there is nothing."""
    start, stop = held
    if not present or start >= stop:
        return "-"
    return str(start) if stop - start == 1 else f"{start}..{stop - 1}"
