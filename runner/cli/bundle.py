"""`shardline bundle`: sign a bundle, pack it to be carried, unpack it, and verify either."""

import json
import re
from pathlib import Path
from typing import Annotated

import typer

from parallel.errors import ConfigError

bundle = typer.Typer(
    help="Sign a bundle, pack it to be carried, unpack it, verify it.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

_SIZE = re.compile(r"([0-9]+)([KMGT]?)i?B?")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}

Folder = Annotated[Path, typer.Argument(metavar="BUNDLE", help="The bundle, a folder.")]
Key = Annotated[
    Path | None, typer.Option("--key", metavar="FILE", help="Sign with this ed25519 key (PEM).")
]
PublicKey = Annotated[
    Path | None,
    typer.Option("--public-key", metavar="FILE", help="Ask for a signature by this key (PEM)."),
]


@bundle.command("sign")
def sign(
    folder: Folder,
    *,
    key: Annotated[
        Path, typer.Option("--key", metavar="FILE", help="An ed25519 private key (PEM).")
    ],
) -> None:
    """Sign a bundle's manifest, which holds the sha256 of every file; every file is read first."""
    from runner.bundle.bundle import Bundle
    from runner.bundle.signature import sign_bundle

    opened = Bundle.open(folder)
    opened.verify()
    sign_bundle(opened.path, key)
    typer.echo(f"{folder} is signed")


@bundle.command("pack")
def pack(
    folder: Folder,
    archive: Annotated[Path, typer.Argument(metavar="FILE.tar", help="What to write.")],
    *,
    key: Key = None,
    split_size: Annotated[
        str | None,
        typer.Option("--split-size", metavar="SIZE", help="Most bytes of a part, such as 4G."),
    ] = None,
) -> None:
    """Pack a bundle into one file, or into FILE.tar.000 and so on, with FILE.tar.sha256."""
    from runner.bundle.archive import pack as write
    from runner.bundle.archive import sums_of
    from runner.bundle.bundle import Bundle
    from runner.bundle.signature import sign_bundle

    part_bytes = None if split_size is None else _bytes(split_size)
    opened = Bundle.open(folder)
    opened.verify()
    if key is not None:
        sign_bundle(opened.path, key)
    for path in (*write(opened.path, archive, part_bytes=part_bytes), sums_of(archive)):
        typer.echo(path)


@bundle.command("unpack")
def unpack(
    archive: Annotated[
        Path, typer.Argument(metavar="FILE.tar", help="The name that pack was given.")
    ],
    folder: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The folder to make.")],
    *,
    public_key: PublicKey = None,
) -> None:
    """Unpack a bundle, and check every file of it.

    Exits with 4 if a part or a file is absent or was changed, or the signature is not as asked.
    """
    from runner.bundle.archive import unpack as read

    read(archive, folder, lambda unpacked: _check(unpacked, public_key))
    typer.echo(f"{folder} is whole")


@bundle.command("verify")
def verify(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="A bundle, or the name that pack was given.")
    ],
    *,
    public_key: PublicKey = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check a bundle's signature and the sha256 of every file, or the parts of a packed one.

    Exits with 4 if a file is absent or was changed, or the signature is not as asked.
    """
    from runner.bundle.archive import check_parts

    if path.is_dir():
        _check(path, public_key)
    elif public_key is not None:
        raise ConfigError(f"{path} is packed; --public-key is for a bundle, so unpack it with it")
    else:
        check_parts(path)
    if as_json:
        typer.echo(json.dumps({"path": str(path), "whole": True, "signed": public_key is not None}))
    else:
        typer.echo(f"{path} is whole{' and signed' if public_key else ''}")


def _check(folder: Path, public_key: Path | None) -> None:
    from runner.bundle.bundle import Bundle
    from runner.bundle.signature import check_signature

    opened = Bundle.open(folder)
    if public_key is not None:
        check_signature(folder, public_key)
    opened.verify()


def _bytes(text: str) -> int:
    """Raises ConfigError: it is no size."""
    match = _SIZE.fullmatch(text)
    if match is None or int(match[1]) == 0:
        raise ConfigError(f"--split-size {text} is no size; use a number of bytes, 500M or 4G")
    return int(match[1]) * _UNITS[match[2]]
