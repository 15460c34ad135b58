"""The weight files that a bundle was made from, by size and sha256."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from runner.bundle.files import hash_files


@dataclass(frozen=True)
class SourceFile:
    """What a file of the checkpoint held."""

    size: int
    sha256: str


def read_source(files: Iterable[Path]) -> dict[str, SourceFile]:
    """Hash the files of a checkpoint, on many threads; the keys are their bare names."""
    paths = sorted(set(files))
    hashes = zip(paths, hash_files(paths), strict=True)
    return {path.name: SourceFile(found.size, found.sha256) for path, found in hashes}


def source_digest(source: Mapping[str, SourceFile]) -> str:
    """sha256 that names all of the files; what a resumed compile compares."""
    values = {name: asdict(file) for name, file in source.items()}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
