"""`shardline inspect`: what a bundle is, what it is bound to, and whether it is whole.

Not here: whether it runs on this host; `run` says that. Needs no torch and no GPU.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from runner.bundle.bundle import Bundle
    from runner.bundle.files import Fault


def inspect(
    bundle: Annotated[Path, typer.Argument(metavar="DIR", help="The bundle, a folder.")],
    *,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read every file and compare its sha256.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what a bundle holds, from its manifest. With --verify, check every hash.

    Exits with 4 if a file is absent or changed, and with 5 if it belongs to another plan or rank.
    """
    from parallel.errors import IntegrityError
    from runner.bundle.bundle import Bundle
    from runner.cli.inspect_text import describe_bundle, describe_faults

    opened = Bundle.open(bundle)
    faults = opened.faults() if verify else None
    if as_json:
        typer.echo(json.dumps(_to_json(opened, faults), indent=2))
    else:
        typer.echo(describe_bundle(opened))
        if faults is not None:
            typer.echo(describe_faults(opened, faults))
    if faults:
        raise IntegrityError(opened.summary(faults))


def _to_json(bundle: "Bundle", faults: "list[Fault] | None") -> dict[str, Any]:
    """The manifest as it is, and what was found wrong with the files; null if none was read."""
    checked = None if faults is None else [vars(fault) for fault in faults]
    return {"path": str(bundle.path), "manifest": bundle.manifest.to_dict(), "faults": checked}
