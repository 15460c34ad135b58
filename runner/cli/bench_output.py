"""Where the result of a benchmark goes: a text or one JSON object, and a file."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from parallel.errors import ConfigError

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Output = Annotated[
    Path | None, typer.Option("--output", metavar="FILE", help="Write the JSON object here, too.")
]


def check_writable(output: Path | None) -> None:
    """Before anything is measured.

    Raises:
        ConfigError: it cannot be written.
    """
    if output is None:
        return
    folder = output.absolute().parent
    if output.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ConfigError(f"--output {output}: give a file in a directory that can be written to")


def show(
    report: dict[str, Any],
    describe: Callable[[dict[str, Any]], str],
    *,
    as_json: bool,
    output: Path | None,
) -> None:
    """Print the report, and write it."""
    if output:
        output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    typer.echo(json.dumps(report) if as_json else describe(report))
