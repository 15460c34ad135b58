"""A bundle as text for a terminal."""

from collections.abc import Sequence
from typing import Any

from parallel.fit import format_bytes
from parallel.graph_plan import GraphPlan, GraphStagePlan
from parallel.plan import RankPlan, ShardPlan, StagePlan
from runner.bundle.bundle import Bundle
from runner.bundle.files import Fault
from runner.bundle.layout import MODEL, artefact_folder, cache_folder, weights_file
from runner.bundle.manifest import Choice
from runner.cli.graph_plan_text import buckets_line, describe_modules, outputs_line
from runner.cli.table import table
from runner.drawing.plan_words import condense, headline
from runner.drawing.words import plural

_RANK_COLUMNS = ("rank>", "stage>", "tp rank>", "modules", "weights>", "caches>")
_ARTEFACT_COLUMNS = ("backend", "ranks", "artefact", "size>")
_CHOICE_COLUMNS = ("rank>", "chosen", "candidates", "reason")
_SHOWN_DIGITS = 12


def describe_bundle(bundle: Bundle) -> str:
    """What it is and what it is bound to; ranks, artefacts and choices; parity and totals."""
    manifest = bundle.manifest
    columns = ("segment", "samples>" if bundle.plan.kind == "graph" else "tokens>")
    lines = [
        headline(bundle.plan),
        f"built on {manifest.host.describe()}",
        f"made from {_source(bundle)}",
        "",
        *table(_RANK_COLUMNS, [_rank_row(bundle, rank) for rank in bundle.plan.ranks]),
        *_shapes(bundle.plan),
        "",
        *table((*columns, *_ARTEFACT_COLUMNS), _artefact_rows(bundle)),
    ]
    if manifest.choices:
        rows = [_choice_row(choice) for choice in manifest.choices]
        lines += ["", *table((*columns, *_CHOICE_COLUMNS), rows)]
    return "\n".join([*lines, "", _parity(manifest.parity), _totals(bundle)])


def describe_faults(bundle: Bundle, faults: Sequence[Fault]) -> str:
    """What reading every file has shown."""
    files = bundle.manifest.files
    size = format_bytes(sum(entry.size for entry in files.values()))
    checked = f"Verified {plural(len(files), 'file')}, {size}"
    if not faults:
        return f"{checked}: every sha256 is right."
    return "\n".join([f"{checked}:", *(f"  {fault}" for fault in faults)])


def _source(bundle: Bundle) -> str:
    source = bundle.manifest.source
    if not source:
        return "random weights, which it does not hold"
    size = format_bytes(sum(file.size for file in source.values()))
    return f"{plural(len(source), 'file')}, {size}"


def _rank_row(bundle: Bundle, rank: RankPlan) -> list[str]:
    weights = bundle.manifest.files.get(weights_file(rank.rank))
    caches = _size_below(bundle, cache_folder(rank.rank))
    numbers = [str(rank.rank), str(rank.stage), str(rank.tp_rank)]
    sizes = [weights.size if weights else 0, caches]
    modules = _modules(bundle.plan.stages[rank.stage])
    return [*numbers, modules, *(format_bytes(size) if size else "-" for size in sizes)]


def _modules(stage: StagePlan) -> str:
    if isinstance(stage, GraphStagePlan):
        return describe_modules(stage)
    return ", ".join(condense(stage.modules))


def _shapes(plan: ShardPlan) -> list[str]:
    """What a tensor model takes and returns."""
    return ["", buckets_line(plan), outputs_line(plan)] if isinstance(plan, GraphPlan) else []


def _artefact_rows(bundle: Bundle) -> list[list[str]]:
    """A row for every segment and bucket that shares an artefact on some ranks."""
    users: dict[tuple[str, int, str], list[int]] = {}
    for rank, uses in enumerate(bundle.manifest.uses):
        for kind, buckets in uses.items():
            for num_tokens, key in buckets.items():
                users.setdefault((kind, num_tokens, key), []).append(rank)
    return [
        [
            kind,
            str(num_tokens),
            bundle.manifest.artefacts[key].backend,
            ",".join(map(str, ranks)),
            key[:_SHOWN_DIGITS],
            format_bytes(_size_below(bundle, artefact_folder(key))),
        ]
        for (kind, num_tokens, key), ranks in sorted(users.items())
    ]


def _choice_row(choice: Choice) -> list[str]:
    candidates = ", ".join(
        candidate.backend
        + ("" if candidate.microseconds is None else f" {candidate.microseconds:.1f} us")
        + (" (fails parity)" if candidate.parity is False else "")
        + (f" ({candidate.note})" if candidate.note else "")
        for candidate in choice.candidates
    )
    place = [choice.kind, str(choice.num_tokens), str(choice.rank)]
    return [*place, choice.chosen, candidates, choice.reason]


def _parity(parity: dict[str, Any]) -> str:
    """The verdict and the numbers beside it; what is nested is for --json."""
    details = [
        f"{name} {value}"
        for name, value in sorted(parity.items())
        if name not in ("passed", "reason") and value and not isinstance(value, dict | list)
    ]
    reason = f": {parity['reason']}" if parity.get("reason") else ""
    outcome = "passed" if parity["passed"] else f"NOT PASSED{reason}"
    return ", ".join([f"Parity: {outcome}", *details])


def _totals(bundle: Bundle) -> str:
    manifest = bundle.manifest
    size = sum(entry.size for entry in manifest.files.values())
    return (
        f"{plural(len(manifest.files), 'file')}, {format_bytes(size)} in all, "
        f"{len(manifest.files_below(MODEL))} of them in the model's folder; "
        f"{plural(len(manifest.artefacts), 'artefact')}"
    )


def _size_below(bundle: Bundle, folder: str) -> int:
    return sum(entry.size for entry in bundle.manifest.files_below(folder).values())
