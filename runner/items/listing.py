"""The items of a run, from folders, files and lists of files. Opens none but the lists.

The order is that of the inputs, and within a folder that of the paths, so it is the same each time.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath

from parallel.errors import ConfigError
from runner.items.item import SUFFIXES, Item, suffix_of

_LOG = logging.getLogger(__name__)

_READ = ", ".join(SUFFIXES)


def list_items(inputs: Sequence[Path], *, output: Path | None = None) -> list[Item]:
    """What the inputs name.

    Args:
        inputs: folders, searched with all that is in them, links followed and hidden files left
            out; files; and .txt lists, one path a line, relative to the list's own folder.
        output: where results go; may not lie in a folder of the inputs, as the next run would
            then read results.

    Raises:
        ConfigError: an input is absent, or given by name and of no kind that is read; two items
            have one name; or there are no items.
    """
    items: dict[str, Item] = {}
    for given in inputs:
        for item in _items_of(given, output):
            other = items.setdefault(item.name, item)
            if other is not item:
                raise ConfigError(
                    f"{other.path} and {item.path} are both named {item.name!r}, and so would be "
                    f"their results; rename one, or run them into two folders"
                )
    if not items:
        raise ConfigError(
            f"there are no items in {', '.join(map(str, inputs)) or 'no inputs'}; read are {_READ}"
        )
    return list(items.values())


def _items_of(given: Path, output: Path | None) -> list[Item]:
    if given.is_dir():
        if output is not None and output.resolve().is_relative_to(given.resolve()):
            raise ConfigError(
                f"the output folder {output} lies in the input folder {given}, so the next run "
                f"would read results; name a folder outside"
            )
        return _in_folder(given)
    if not given.exists():
        raise ConfigError(f"{given} does not exist; name a folder, a file or a .txt list of files")
    if given.suffix.lower() == ".txt":
        return _in_list(given)
    return [_by_name(given, given.name, str(given))]


def _in_folder(folder: Path) -> list[Item]:
    items, unknown = [], []
    for path in sorted(_files_below(folder)):
        relative = path.relative_to(folder)
        if suffix_of(path.name):
            items.append(Item(_name(relative), path))
        else:
            unknown.append(relative)
    if unknown:
        _LOG.warning(
            "%s: left out %d of %d files (%s for example); read are %s",
            folder,
            len(unknown),
            len(unknown) + len(items),
            unknown[0],
            _READ,
        )
    return items


def _files_below(folder: Path) -> Iterator[Path]:
    seen = set()
    for where, folders, files in os.walk(folder, onerror=_refuse, followlinks=True):
        status = os.stat(where)
        identity = (status.st_dev, status.st_ino)
        # A link that leads back up would be followed for ever.
        folders[:] = [] if identity in seen else sorted(f for f in folders if f[0] != ".")
        if identity not in seen:
            yield from (Path(where, file) for file in files if file[0] != ".")
        seen.add(identity)


def _refuse(error: OSError) -> None:
    raise ConfigError(f"cannot list {error.filename}: {error.strerror}") from error


def _in_list(file: Path) -> list[Item]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not UTF-8 (byte {error.start})") from error
    return [
        _by_name(file.parent / line.strip(), line.strip(), f"{file}, line {number}: {line.strip()}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]


def _by_name(path: Path, given: str, where: str) -> Item:
    """An item that a user named, so that it has to be one."""
    if not path.is_file():
        raise ConfigError(f"{where} is {'no file' if path.exists() else 'absent'}")
    if not suffix_of(path.name):
        raise ConfigError(f"{where} is of no kind that is read; read are {_READ}")
    relative = PurePath(given)
    inside = not relative.is_absolute() and ".." not in relative.parts
    return Item(_name(relative if inside else PurePath(relative.name)), path)


def _name(relative: PurePath) -> str:
    return relative.as_posix()[: -len(suffix_of(relative.name))]
