"""`shardline doctor`: print what this host or container lacks, and how to fix it.

Not here: the checks; they are in `runner.observe`.
"""

import json
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from runner.observe.doctor import Diagnosis
    from runner.observe.finding import Finding

_STYLES = {"ok": "green", "warning": "yellow", "error": "bold red", "absent": "dim"}


def doctor(
    *,
    gpus: Annotated[
        int, typer.Option("--gpus", min=0, help="Fail unless this many GPUs are usable.")
    ] = 0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of a table.")
    ] = False,
) -> None:
    """Check this host or container and print the fix for what it lacks.

    Exits with 3 if a check found an error. A host without a GPU is fine unless --gpus asks for one.
    """
    from runner.observe.doctor import diagnose

    diagnosis = diagnose(num_gpus_demanded=gpus)
    if as_json:
        typer.echo(json.dumps(diagnosis.to_json(), indent=2))
    else:
        _print_diagnosis(diagnosis)
    raise typer.Exit(diagnosis.exit_code)


def _print_diagnosis(diagnosis: "Diagnosis") -> None:
    from rich.console import Console

    from runner.observe.links import format_matrix

    console = Console(highlight=False)
    width = max(len(finding.check) for finding in diagnosis.findings)
    for finding in diagnosis.findings:
        _print_finding(console, finding, width=width)
    inventory = diagnosis.inventory
    if inventory.pairs:
        matrix = format_matrix((gpu.index for gpu in inventory.gpus), pairs=inventory.pairs)
        console.print(f"\n{matrix}", markup=False, soft_wrap=True)
    console.print(_summarize(diagnosis.findings))


def _print_finding(console: "Console", finding: "Finding", *, width: int) -> None:
    from rich.text import Text

    # Lines are never wrapped: a fix must survive being copied from a narrow terminal.
    status = (f"{finding.status:<9}", _STYLES[finding.status])
    line = Text.assemble(status, f"{finding.check:<{width}}  {finding.detail}")
    console.print(line, soft_wrap=True)
    if finding.fix is not None:
        indent = " " * (9 + width + 2)
        console.print(Text(f"{indent}fix: {finding.fix}"), soft_wrap=True)


def _summarize(findings: "tuple[Finding, ...]") -> str:
    counts = {
        status: sum(finding.status == status for finding in findings)
        for status in ("error", "warning")
    }
    parts = [f"{count} {status}{'s' * (count != 1)}" for status, count in counts.items() if count]
    return f"\n{', '.join(parts) or 'no errors, no warnings'}"
