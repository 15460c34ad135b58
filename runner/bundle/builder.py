"""`BundleBuilder`: writes a bundle aside, part by part, and gives it its name when it is whole.

A compile that is killed goes on where it was: finished artefacts and weights stay in `OUT.partial`.
Several ranks write into it at once, each its own parts; one of them leads. Not here: what is
compiled, and what an artefact is.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any

from parallel.errors import InternalError, PreflightError
from parallel.plan import ShardPlan
from runner.bundle import layout
from runner.bundle.durable import flush, remove, rename, write_text, writing
from runner.bundle.files import FileHash, hash_file, hash_files, list_files
from runner.bundle.ledger import Ledger
from runner.bundle.lock import exclusive
from runner.bundle.manifest import FileEntry, Manifest, place_of
from runner.bundle.replacement import check_target, finish_replacement, replace_folder
from runner.bundle.reuse import OldArtefacts
from runner.bundle.weights_file import Owner, TensorHeader, headers_of, write_weights

if TYPE_CHECKING:
    import torch

_LOG = logging.getLogger(__name__)


class BundleBuilder:
    """One rank's hand on a bundle that is being built.

    Attributes:
        folder: where it is built; beside `out`, so that it can be renamed.
    """

    def __init__(self, out: Path, plan: ShardPlan, *, reuse_from: Sequence[Path] = ()) -> None:
        """Join a bundle that another rank of this compile leads; see `lead`.

        Args:
            reuse_from: bundles whose artefacts may be taken over.
        """
        self.out = out.resolve()
        self.folder = layout.partial_of(self.out)
        self._plan = plan
        self._digest = plan.digest()
        self._old = OldArtefacts(reuse_from)
        self._ledger = Ledger(self.folder)
        self._checked: set[str] = set()
        self._overwrite = False

    @classmethod
    @contextmanager
    def lead(
        cls,
        out: Path,
        plan: ShardPlan,
        *,
        overwrite: bool = False,
        reuse_from: Sequence[Path] = (),
        has_weights: bool = True,
    ) -> Iterator[BundleBuilder]:
        """Begin or resume a bundle; the others join when the body runs.

        Args:
            overwrite: a bundle that is at `out` already may be replaced in the end.
            has_weights: whether ranks will write weights.

        Raises:
            ConfigError: `out` is taken.
            PreflightError: another compile writes it, or the disk has no room for the weights.
        """
        builder = cls(out, plan, reuse_from=reuse_from)
        builder._overwrite = overwrite
        with writing(builder.out):
            builder.out.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(layout.lock_of(builder.out), writer="compile", written="bundle"):
            finish_replacement(builder.out)
            check_target(builder.out, overwrite=overwrite)
            with writing(builder.folder):
                builder._resume()
                if has_weights:
                    builder._check_room()
            yield builder

    def finished_artefact(self, key: str) -> bool:
        """Whether an artefact is whole, its hashes checked: here, or in a bundle to reuse."""
        if key in self._checked or self._is_whole(key, "", layout.artefact_folder(key)):
            return True
        found = self._old.find(key)
        if found is None:
            return False
        with self.artefact(key) as folder, writing(folder):
            self._old.link(found, folder)
        return True

    @contextmanager
    def artefact(self, key: str) -> Iterator[Path]:
        """An empty folder for the files of an artefact, which is finished when the body ends.

        A body that raises leaves nothing. Of two ranks that make one artefact, the first one wins.
        """
        aside = self.folder / layout.BUILDING / f"{key}.{os.getpid()}"
        remove(aside)
        with writing(aside):
            aside.mkdir(parents=True)
        try:
            yield aside
            with writing(self.artefact_folder(key)):
                self._finish_artefact(key, aside)
        finally:
            remove(aside)

    @contextmanager
    def desk(self, purpose: str) -> Iterator[Path]:
        """An empty folder for what nobody needs when the body ends; if that is killed, the next
        compile removes it.
        """
        building = self.folder / layout.BUILDING
        with writing(building):
            building.mkdir(parents=True, exist_ok=True)
            folder = Path(mkdtemp(prefix=f"{purpose}.", dir=building))
        try:
            yield folder
        finally:
            remove(folder)

    def artefact_folder(self, key: str) -> Path:
        """Where a finished artefact lies until the bundle is published."""
        return self.folder / layout.artefact_folder(key)

    def finished_weights(self, rank: int, source: str) -> bool:
        """Whether the weights of a rank are whole, and made from this source by this plan.

        Args:
            source: names what the weights are made from; `source_digest` of the checkpoint.
        """
        return self._is_whole(f"rank{rank}", self._made_from(source), layout.weights_file(rank))

    def write_weights(
        self,
        rank: int,
        tensors: Iterable[tuple[str, torch.Tensor]],
        *,
        source: str,
        headers: Mapping[str, TensorHeader] | None = None,
    ) -> None:
        """Stream the weights of a rank into its file.

        Args:
            tensors: as `parallel.weights.stream` yields them.
            source: as for `finished_weights`.
            headers: of `tensors`, in order, where they are not those of the plan.

        Raises:
            PreflightError: the disk is full, for example.
        """
        name = layout.weights_file(rank)
        target = self.folder / name
        aside = self.folder / layout.BUILDING / target.name
        with writing(target):
            for path in (aside, target):
                path.parent.mkdir(exist_ok=True)
            expected = headers or headers_of(self._plan.ranks[rank], self._plan.dtype)
            found = write_weights(aside, expected, tensors, Owner(self._digest, rank))
            rename(aside, target)
            self._ledger.record(f"rank{rank}", self._made_from(source), {name: found})

    def copy_model_files(self, folder: Path, names: Iterable[str]) -> None:
        """Copy configuration, tokenizer and the like from the model's folder."""
        self._copy(folder, names, layout.MODEL)

    def copy_caches(self, rank: int, folder: Path) -> None:
        """Copy all files of a rank's runtime caches."""
        self._copy(folder, sorted(list_files(folder, ".")), layout.cache_folder(rank))

    def publish(self, manifest: Manifest, *, report: Mapping[str, Any]) -> None:
        """Complete the manifest by the hashes of all files, and rename the bundle to `out`.

        Only the leader calls this, after all ranks have finished their parts. An old bundle at
        `out` gives way at one instant, and is removed then.

        Args:
            manifest: without its files. Where its `source` is empty, the weights are random, and
                the bundle holds none.
            report: what may differ from build to build, such as times.

        Raises:
            InternalError: an artefact that the manifest names, or a rank's weights, is not there.
        """
        check_target(self.out, overwrite=self._overwrite)
        with writing(self.out):
            self._drop_unused(manifest)
            complete = replace(manifest, files=self._entries(manifest))
            write_text(self.folder / layout.REPORT, json.dumps(report, indent=1) + "\n")
            write_text(self.folder / layout.MANIFEST, complete.to_text())
            replace_folder(self.folder, self.out)
            # Not before: until now, a kill leaves what a resumed compile goes on with.
            remove(self.out / layout.FINISHED)

    def _resume(self) -> None:
        """Keep the parts that are whole, and nothing else."""
        self.folder.mkdir(exist_ok=True)
        self._ledger.sweep()
        never_kept = (layout.BUILDING, layout.MODEL, layout.CACHES, layout.MANIFEST, layout.REPORT)
        for name in never_kept:
            remove(self.folder / name)
        (self.folder / layout.BUILDING).mkdir()

    def _check_room(self) -> None:
        """Raises PreflightError: the weights that are not there yet do not fit on the disk."""
        missing = [
            rank.weight_bytes
            for rank in self._plan.ranks
            if not (self.folder / layout.weights_file(rank.rank)).exists()
        ]
        free = shutil.disk_usage(self.folder).free
        if sum(missing) > free:
            raise PreflightError(
                f"the weights take {sum(missing) / 1e9:.1f} GB and the disk of {self.folder} has "
                f"{free / 1e9:.1f} GB free; make room or name a folder on another disk"
            )

    def _is_whole(self, part: str, made_from: str, below: str) -> bool:
        if self._ledger.find(part) is None:
            return False
        if problem := self._ledger.check(part, made_from, below):
            _LOG.warning("%s of an earlier compile is made again: %s", part, problem)
            self._ledger.forget(part)
            remove(self.folder / below)
            return False
        self._checked.add(part)
        return True

    def _finish_artefact(self, key: str, aside: Path) -> None:
        target = self.artefact_folder(key)
        target.parent.mkdir(exist_ok=True)
        names = sorted(list_files(aside, "."))
        if links := [name for name in names if not _is_plain(aside / name)]:
            raise InternalError(f"artefact {key}: {links[0]} is no plain file")
        files = {f"{layout.artefact_folder(key)}/{name}": hash_file(aside / name) for name in names}
        try:
            rename(aside, target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            return  # another rank was first
        self._ledger.record(key, "", files)
        self._checked.add(key)

    def _made_from(self, source: str) -> str:
        return hashlib.sha256(f"{self._digest} {source}".encode()).hexdigest()

    def _copy(self, folder: Path, names: Iterable[str], below: str) -> None:
        for name in names:
            target = self.folder / below / name
            with writing(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(folder / name, target)
                flush(target)

    def _drop_unused(self, manifest: Manifest) -> None:
        """What an earlier compile with other settings left."""
        used = {layout.artefact_folder(key) for key in manifest.artefacts}
        if manifest.has_weights:
            used |= {layout.weights_file(rank.rank) for rank in self._plan.ranks}
        for below in (layout.ARTEFACTS, layout.WEIGHTS):
            for path in (self.folder / below).glob("*"):
                if path.relative_to(self.folder).as_posix() not in used:
                    remove(path)
        remove(self.folder / layout.BUILDING)

    def _entries(self, manifest: Manifest) -> dict[str, FileEntry]:
        """The manifest's table of files; what is recorded is not hashed again."""
        hashes: dict[str, FileHash] = {}
        ranks = self._plan.ranks if manifest.has_weights else ()
        for part in [*manifest.artefacts, *(f"rank{rank.rank}" for rank in ranks)]:
            found = self._ledger.find(part)
            if found is None:
                raise InternalError(f"{self.folder}: {part} is not finished")
            hashes |= found.files
        copied = sorted(
            n for f in (layout.MODEL, layout.CACHES) for n in list_files(self.folder, f)
        )
        hashes |= zip(copied, hash_files(self.folder / name for name in copied), strict=True)
        return {
            name: FileEntry(found.size, found.sha256, found.chunks, place_of(name, self._plan))
            for name, found in hashes.items()
        }


def _is_plain(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()
