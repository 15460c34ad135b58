"""What goes into a bundle beside its artefacts: weights, the model's files, and the manifest."""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from parallel.collectives import Group
from runner.build.built import Built
from runner.build.parity import ParityReport
from runner.build.sharing import gather
from runner.bundle.builder import BundleBuilder
from runner.bundle.host import Host
from runner.bundle.manifest import Manifest
from runner.bundle.source import SourceFile, read_source, source_digest
from runner.planning import Job

MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
)
"""What of a model's folder a bundle takes along, where it is there."""


@dataclass(frozen=True)
class _NamedFile:
    name: str
    file: SourceFile


def source_of(job: Job, group: Group) -> dict[str, SourceFile]:
    """The files that the weights are read from, on every rank of `group`; each reads a part of
    them. Random weights come from none.
    """
    if job.has_random_weights:
        return {}
    files = sorted({info.file for info in job.spec.checkpoint.tensors.values()})
    mine = read_source(files[group.rank :: group.size])
    named = [_NamedFile(name, file) for name, file in mine.items()]
    found = {entry.name: entry.file for entry in gather(_NamedFile, named, group)}
    return dict(sorted(found.items()))


def write_weights(
    job: Job, rank: int, builder: BundleBuilder, source: dict[str, SourceFile]
) -> None:
    """Random weights are made again wherever they are needed."""
    if job.has_random_weights:
        return
    digest = source_digest(source)
    if not builder.finished_weights(rank, digest):
        dtype, device = getattr(torch, job.plan.dtype), torch.device("cpu")
        tensors = job.weights(rank, dtype=dtype, device=device)
        builder.write_weights(rank, tensors, source=digest)


def publish(
    job: Job,
    builder: BundleBuilder,
    host: Host,
    source: dict[str, SourceFile],
    built: list[Built],
    parity: ParityReport,
) -> None:
    """Complete the bundle; `host` is what it was compiled for."""
    folder = job.spec.folder
    builder.copy_model_files(folder, [name for name in MODEL_FILES if (folder / name).is_file()])
    manifest = Manifest(
        plan=job.plan.to_dict(),
        plan_digest=job.plan.digest(),
        config=portable_config(job, host.device),
        source=source,
        host=host,
        artefacts={b.key: b.artefact for b in built},
        uses=uses_of(built, len(job.plan.ranks)),
        choices=tuple(choice for b in built for choice in b.choices),
        parity=parity.to_dict(),
        files={},
    )
    builder.publish(manifest, report={"built": [asdict(b) for b in built]})


def portable_config(job: Job, device_type: str) -> dict[str, Any]:
    """The configuration in effect, with nothing in it that only this host has."""
    config: dict[str, Any] = job.config.model_dump()
    config["model"] |= {
        "path": "model",
        "dtype": job.plan.dtype,
        "max_model_len": job.plan.max_model_len,
    }
    config["parallel"]["device"] = device_type
    return config


def uses_of(built: list[Built], world_size: int) -> tuple[dict[str, dict[int, str]], ...]:
    """For each rank: kind of part -> number of rows -> key of its artefact."""
    uses: tuple[dict[str, dict[int, str]], ...] = tuple({} for _ in range(world_size))
    for made in built:
        for use in made.uses:
            uses[use.rank].setdefault(use.kind, {})[use.num_rows] = made.key
    return uses
