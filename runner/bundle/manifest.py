"""`Manifest`: what a bundle is, what it was made from and for, and the hash of every file.

Its last guard is its own hash, that of all its lines but the one that holds it:
`grep -v '^ "self": ' manifest.json | sha256sum`.

The file is text that depends on nothing but what is in it: no times, no places on a disk. Two
bundles made from the same things have the same manifest. Not here: the files themselves.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallel.errors import IncompatibleError, IntegrityError
from parallel.plan import ShardPlan
from parallel.records import read_record
from runner.bundle.files import CHUNK_BYTES, FileHash
from runner.bundle.host import Host
from runner.bundle.layout import (
    CACHES,
    CONTENTS,
    MANIFEST,
    WEIGHTS,
    rebuild_command,
    weights_file,
)
from runner.bundle.source import SourceFile
from runner.config.json_file import read_json_object

SCHEMA = 2

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Place:
    """The mesh coordinate of a rank."""

    rank: int
    stage: int
    tp_rank: int


@dataclass(frozen=True)
class FileEntry(FileHash):
    """A file, and the rank that it belongs to; None: all ranks share it."""

    place: Place | None = None


@dataclass(frozen=True)
class Artefact:
    """A compiled segment; its files are those in the folder of its key.

    Attributes:
        kind, num_tokens: the segment and bucket that it was built for first; see `uses` for all.
    """

    backend: str
    kind: str
    num_tokens: int


@dataclass(frozen=True)
class Candidate:
    """A backend that was tried for a segment.

    Attributes:
        microseconds: of a call; None where it was not measured.
        parity: whether it computed what the segment computes; None where it was not compared.
        note: why it is out, for example.
    """

    backend: str
    key: str
    microseconds: float | None = None
    parity: bool | None = None
    note: str = ""


@dataclass(frozen=True)
class Choice:
    """The backend chosen for a segment and bucket on a rank, and why."""

    kind: str
    num_tokens: int
    rank: int
    candidates: tuple[Candidate, ...]
    chosen: str
    reason: str


@dataclass(frozen=True)
class Manifest:
    """All that is known of a bundle.

    Attributes:
        plan: `ShardPlan.to_dict()`.
        plan_digest: `ShardPlan.digest()`.
        config: the effective configuration.
        source: the weight files of the checkpoint; empty where weights are random ones, which no
            bundle holds.
        host: what it was compiled on.
        artefacts: by key.
        uses: for each rank, segment kind -> bucket (number of tokens) -> key.
        parity: the comparison with the uncompiled model; its key "passed" is true or false.
        files: every file but the manifest and the report; filled in when the bundle is published.
    """

    plan: dict[str, Any]
    plan_digest: str
    config: dict[str, Any]
    source: dict[str, SourceFile]
    host: Host
    artefacts: dict[str, Artefact]
    uses: tuple[dict[str, dict[int, str]], ...]
    choices: tuple[Choice, ...]
    parity: dict[str, Any]
    files: dict[str, FileEntry]

    @classmethod
    def read(cls, bundle: Path) -> "Manifest":
        """Read and check the manifest of a bundle.

        Raises:
            IntegrityError: it is absent, was edited or damaged, or contradicts itself.
            IncompatibleError: it was written by a version of shardline with another schema.
        """
        path = bundle / MANIFEST
        try:
            values = read_json_object(path)
            _check_schema(values.pop("schema", None), path, bundle)
            _check_self(path, values.pop("self", None))
            manifest = read_record(cls, values, "manifest")
            manifest._check()
        except IntegrityError as error:
            raise IntegrityError(
                f"{path}: {error}; copy the bundle again, or build it: {rebuild_command(bundle)}"
            ) from None
        return manifest

    @property
    def backends(self) -> set[str]:
        """Of the artefacts that are used."""
        return {artefact.backend for artefact in self.artefacts.values()}

    @property
    def has_weights(self) -> bool:
        """Whether the bundle holds weights; random ones are made anew in every run."""
        return bool(self.source)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, without the manifest's own hash."""
        return {"schema": SCHEMA, **json.loads(json.dumps(self, default=vars, allow_nan=False))}

    def to_text(self) -> str:
        """The contents of manifest.json."""
        values = self.to_dict()
        return _render({**values, "self": hashlib.sha256(_render(values).encode()).hexdigest()})

    def files_below(self, folder: str) -> dict[str, FileEntry]:
        """Those in a folder of the bundle, such as "model"."""
        return {n: entry for n, entry in self.files.items() if n.startswith(f"{folder}/")}

    def _check(self) -> None:
        """Raises IntegrityError: a part names another that is not there."""
        if not isinstance(self.parity.get("passed"), bool):
            raise IntegrityError("parity.passed is missing; it must be true or false")
        for name, entry in self.files.items():
            _check_entry(name, entry)
        for key in self.artefacts:
            if not _SHA256.fullmatch(key):
                raise IntegrityError(f"artefacts has the key {key!r}; it must be a sha256")
        for rank, uses in enumerate(self.uses):
            is_listed = weights_file(rank) in self.files
            if is_listed != self.has_weights:
                raise IntegrityError(
                    f"{weights_file(rank)} is {'in' if is_listed else 'missing from'} files; "
                    f"source has {len(self.source)} files"
                )
            for kind, tokens, key in _used(uses):
                if key not in self.artefacts:
                    raise IntegrityError(
                        f"uses[{rank}].{kind}[{tokens}] is {key!r}, which is no artefact"
                    )


def place_of(name: str, plan: ShardPlan) -> Place | None:
    """Of the rank whose file it is, such as weights/rank3.safetensors or one in caches/rank3.

    Raises:
        IntegrityError: the plan has no such rank.
    """
    folder, _, below = name.partition("/")
    if folder not in (WEIGHTS, CACHES):
        return None
    owners = {f"rank{rank.rank}": rank for rank in plan.ranks}
    owner = owners.get(below.partition("/")[0].removesuffix(".safetensors"))
    if owner is None:
        raise IntegrityError(f"files has {name!r}, which is of none of {len(owners)} ranks")
    return Place(owner.rank, owner.stage, owner.tp_rank)


def _check_schema(schema: Any, path: Path, bundle: Path) -> None:
    if type(schema) is not int:
        raise IntegrityError(
            f"schema is {json.dumps(schema)}; it must be a number, as in every manifest of a bundle"
        )
    if schema != SCHEMA:
        raise IncompatibleError(
            f"{path} has schema version {schema}, this shardline reads version {SCHEMA}; build "
            f"the bundle with this version: {rebuild_command(bundle)}"
        )


def _check_self(path: Path, said: Any) -> None:
    """Every byte counts, white space and keys that are given twice among them."""
    data = path.read_bytes().replace(f' "self": {json.dumps(said)},\n'.encode(), b"", 1)
    found = hashlib.sha256(data).hexdigest()
    if found != said:
        raise IntegrityError(
            f"it was edited or damaged: it says that its sha256 is {said}, and that is {found}"
        )


def _render(values: Mapping[str, Any]) -> str:
    return json.dumps(values, sort_keys=True, indent=1) + "\n"


def _check_entry(name: str, entry: FileEntry) -> None:
    if name.partition("/")[0] not in CONTENTS:
        raise IntegrityError(f"files has {name!r}, which lies in none of {', '.join(CONTENTS)}")
    chunked = entry.size > CHUNK_BYTES
    num_chunks = -(-entry.size // CHUNK_BYTES) if chunked else 0
    if entry.size < 0 or len(entry.chunks) != num_chunks:
        raise IntegrityError(
            f"files[{name}] has {entry.size} bytes and {len(entry.chunks)} chunks; that size has "
            f"{num_chunks}"
        )


def _used(uses: Mapping[str, Mapping[int, str]]) -> Iterator[tuple[str, int, str]]:
    for kind, buckets in uses.items():
        for num_tokens, key in buckets.items():
            yield kind, num_tokens, key
