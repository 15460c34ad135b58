"""run.json: what the results of a folder were made with; a folder never holds those of two runs,
and one run at a time writes it.

Not here: the results (`writing`), and the bad items (`failures`).
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from parallel.errors import ConfigError, IntegrityError
from runner.bundle.durable import rename, writing
from runner.bundle.lock import exclusive
from runner.config.json_file import read_json_object

LOCK = ".lock"
RECORD = "run.json"
PARTIAL = ".partial"
"""How a file's name ends, after a dot at its beginning, until it is whole."""


def partial_of(path: Path) -> Path:
    """What a file is called until it is whole; in the same folder, so that it can be renamed."""
    return path.with_name(f".{path.name}{PARTIAL}")


def check_run_folder(
    folder: Path, settings: Callable[[], Mapping[str, Any]], *, overwrite: bool
) -> None:
    """Look whether `hold_run_folder` would take a folder; nothing is written.

    Args:
        settings: asked for only where the folder is of a run already.

    Raises:
        ConfigError: as there.
    """
    if folder.is_dir():
        _check_run(folder, settings, overwrite=overwrite)
    elif folder.exists():
        raise ConfigError(f"{folder} is a file; name a folder that is empty or not there yet")


@contextmanager
def hold_run_folder(
    folder: Path, settings: Mapping[str, Any], *, overwrite: bool
) -> Iterator[None]:
    """Make a folder one of this run, hold it locked, and sweep what a killed run left half written.

    Args:
        settings: JSON values that decide what a result is; a later run must have the same.
        overwrite: empty a folder of another run first.

    Raises:
        ConfigError: the folder is of something else.
        PreflightError: another run writes this folder, or it cannot be written.
    """
    check_run_folder(folder, lambda: settings, overwrite=overwrite)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with exclusive(folder / LOCK, writer="run", written="folder"):
        with writing(folder):
            _begin_run(folder, settings, overwrite=overwrite)
            _remove_partial_files(folder)
        yield


def _check_run(folder: Path, settings: Callable[[], Mapping[str, Any]], *, overwrite: bool) -> None:
    if not (folder / RECORD).exists():
        _refuse_strange_folder(folder)
    elif not overwrite:
        _refuse_other_settings(folder, json.loads(json.dumps(dict(settings()))))


def _begin_run(folder: Path, settings: Mapping[str, Any], *, overwrite: bool) -> None:
    """Of a folder that this process has locked."""
    record = folder / RECORD
    _check_run(folder, lambda: settings, overwrite=overwrite)
    if record.exists():
        if not overwrite:
            return
        _empty(folder)
    aside = partial_of(record)
    aside.write_text(json.dumps(dict(settings), indent=2) + "\n", encoding="utf-8")
    rename(aside, record)


def _remove_partial_files(folder: Path) -> None:
    """What a run that was killed was writing."""
    for where, _, files in os.walk(folder):
        for file in files:
            if _is_partial(file):
                Path(where, file).unlink()


def _is_partial(name: str) -> bool:
    return name.startswith(".") and name.endswith(PARTIAL)


def _refuse_strange_folder(folder: Path) -> None:
    held = [path.name for path in folder.iterdir()]
    strange = sorted(name for name in held if name != LOCK and not _is_partial(name))
    if strange:
        raise ConfigError(
            f"{folder} holds {strange[0]} and no {RECORD}, so it is not of a run; name a folder "
            f"that is empty or not there yet"
        )


def _refuse_other_settings(folder: Path, settings: dict[str, Any]) -> None:
    try:
        before = read_json_object(folder / RECORD)
    except IntegrityError as error:
        raise ConfigError(f"{error}; name another folder, or use --overwrite") from error
    for key in [*settings, *before]:
        was, wanted = before.get(key), settings.get(key)
        if was != wanted:
            raise ConfigError(
                f"{folder} has results of a run with {key}={json.dumps(was)}, this one has "
                f"{json.dumps(wanted)}; name another folder, or use --overwrite"
            )


def _empty(folder: Path) -> None:
    """The record goes last: until then the folder is refused, or emptied again."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name not in (LOCK, RECORD):
            path.unlink()
    (folder / RECORD).unlink()
