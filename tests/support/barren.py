"""An environment in which nothing can be compiled, and nothing compiled before can be found."""

import os
from pathlib import Path

_FOLDERS = ("PATH", "HOME", "TMPDIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


def barren(folder: Path) -> dict[str, str]:
    """All variables of a process that sees no program and only empty folders, made in `folder`.

    With SHARDLINE_DEBUG, so that each rank says what it compiled.
    """
    values = {name: str(folder / name.lower()) for name in _FOLDERS}
    for path in values.values():
        os.makedirs(path)
    return values | {"SHARDLINE_DEBUG": "1", "OMP_NUM_THREADS": "1", "CXX": "c++-that-is-not-there"}


def left_in(folder: Path) -> list[Path]:
    """What a process that ran in it has written."""
    return [path for path in folder.rglob("*") if not path.is_dir()]
