"""What a bundle was made from, and its manifest."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from parallel.collectives import Group
from runner.build.built import Built
from runner.build.recipe import Recipe, Verdict
from runner.build.sharing import gather
from runner.bundle.builder import BundleBuilder
from runner.bundle.host import Host
from runner.bundle.manifest import Manifest
from runner.bundle.source import SourceFile, read_source


@dataclass(frozen=True)
class _NamedFile:
    name: str
    file: SourceFile


def source_of(files: Sequence[Path], group: Group) -> dict[str, SourceFile]:
    """Size and sha256 of files, on every rank of `group`; each reads a part of them."""
    mine = read_source(files[group.rank :: group.size])
    named = [_NamedFile(name, file) for name, file in mine.items()]
    found = {entry.name: entry.file for entry in gather(_NamedFile, named, group)}
    return dict(sorted(found.items()))


def publish(
    recipe: Recipe,
    builder: BundleBuilder,
    host: Host,
    source: dict[str, SourceFile],
    built: list[Built],
    verdict: Verdict,
) -> None:
    """Complete the bundle; `host` is what it was compiled for."""
    recipe.copy_files(builder)
    plan = recipe.job.plan
    manifest = Manifest(
        plan=plan.to_dict(),
        plan_digest=plan.digest(),
        config=recipe.portable_config(host.device),
        source=source,
        host=host,
        artefacts={b.key: b.artefact for b in built},
        uses=uses_of(built, len(plan.ranks)),
        choices=tuple(choice for b in built for choice in b.choices),
        parity=verdict.to_dict(),
        files={},
    )
    builder.publish(manifest, report={"built": [asdict(b) for b in built]})


def uses_of(built: list[Built], world_size: int) -> tuple[dict[str, dict[int, str]], ...]:
    """For each rank: kind of part -> number of rows -> key of its artefact."""
    uses: tuple[dict[str, dict[int, str]], ...] = tuple({} for _ in range(world_size))
    for made in built:
        for use in made.uses:
            uses[use.rank].setdefault(use.kind, {})[use.num_rows] = made.key
    return uses
