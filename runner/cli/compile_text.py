"""What a compile came to, as text."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from runner.cli.table import table
from runner.drawing.words import plural

if TYPE_CHECKING:
    from runner.build.built import Built
    from runner.build.compile import Outcome

_CONVERTED = "ops in TensorRT>"
_COLUMNS = ("segment", "rows>", "backend", _CONVERTED, "us>", "build s>", "bytes>", "ranks")


def summary(outcome: "Outcome", output: Path) -> str:
    """A line a segment and bucket, the totals, and the comparison with the uncompiled model."""
    built = sorted(outcome.built, key=lambda b: (b.kind, b.num_rows, b.uses[0].rank))
    unique = {b.key: b for b in built}.values()
    # Segments of two kinds can be one artefact, which is built for the first of them.
    made = {b.key for b in built if b.seconds}
    has_engines = any(c.backend == "tensorrt" for b in built for c in b.candidates)
    columns = [column for column in _COLUMNS if has_engines or column != _CONVERTED]
    return "\n".join(
        [
            *table(columns, [_row(b, has_engines=has_engines) for b in built]),
            "",
            f"{plural(len(unique), 'artefact')}, {len(made)} built in "
            f"{sum(b.seconds for b in built):.1f} s of work, {sum(b.num_bytes for b in unique):,} "
            "bytes",
            *_refusals(built),
            outcome.parity.line(),
            str(output),
        ]
    )


def _refusals(built: "Sequence[Built]") -> Iterator[str]:
    """Which candidates of `auto` could not run which share of the segments, and why the first."""
    notes: dict[str, list[str]] = {}
    for one in built:
        for candidate in one.candidates:
            if candidate.note:
                notes.setdefault(candidate.backend, []).append(candidate.note)
    for backend, reasons in notes.items():
        yield f"{backend}: left out of {len(reasons)} of {len(built)} segments; {reasons[0]}"


def _row(built: "Built", *, has_engines: bool) -> list[str]:
    chosen = next(c for c in built.candidates if c.key == built.key)
    converted = built.num_ops if built.backend == "tensorrt" else 0
    return [
        built.kind,
        str(built.num_rows),
        built.backend,
        *([f"{converted} of {built.num_ops}"] if has_engines else []),
        "-" if chosen.microseconds is None else f"{chosen.microseconds:.1f}",
        f"{built.seconds:.1f}",
        f"{built.num_bytes:,}",
        ",".join(map(str, sorted({use.rank for use in built.uses}))),
    ]
