"""`Bundle`: the only thing that goes from `compile` to `run` and `serve`. The third hinge.

A folder whose every file is in its manifest with size and sha256. Nothing of it is unpickled, and
no file is used before its hash was checked. How one is made is `runner.bundle.builder`.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from parallel.errors import IncompatibleError, IntegrityError, PreflightError
from parallel.plan import RankPlan, ShardPlan
from parallel.plans import read_plan
from runner.bundle import layout
from runner.bundle.files import Fault, find_faults, find_misfits, find_unreadable, list_files
from runner.bundle.host import Host, check_host
from runner.bundle.manifest import Manifest, place_of
from runner.bundle.weights_file import Owner, read_header, read_weights

if TYPE_CHECKING:
    import torch


class Bundle:
    """A bundle whose manifest is right and whose files are all there.

    Attributes:
        plan: who holds what; its digest is that of the manifest.
    """

    def __init__(self, path: Path, manifest: Manifest, plan: ShardPlan) -> None:
        self.path = path
        self.manifest = manifest
        self.plan = plan
        self._checked: set[str] = set()

    @classmethod
    def open(cls, path: Path) -> Bundle:
        """Check all that can be told without reading the files: manifest, names, sizes, owners.

        Raises:
            PreflightError: this user may not read some of it.
            IntegrityError: it is no bundle, not finished, edited, or a file is absent, too many or
                of another size.
            IncompatibleError: another schema version, or a file of another plan or rank.
        """
        _check_access(path)
        _check_folder(path)
        manifest = Manifest.read(path)
        bundle = cls(path, manifest, _read_plan(path, manifest))
        bundle._refuse(bundle._strangers(*layout.CONTENTS))
        misfits = find_misfits(path, manifest.files)
        # First, because two files of different sizes that were swapped are misfits, too.
        bundle._check_owners({fault.file for fault in misfits})
        bundle._refuse(misfits)
        return bundle

    @property
    def model_folder(self) -> Path:
        """Configuration, tokenizer and the like, hashes checked.

        Raises:
            IntegrityError: a file was changed.
        """
        self._check_once(layout.MODEL)
        return self.path / layout.MODEL

    def check_host(self, here: Host) -> None:
        """Raises IncompatibleError: what the bundle holds cannot run on this host."""
        check_host(self.manifest.host, here, self.manifest.backends, bundle=self.path)

    def weights(self, rank: int, *, device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, tensor on `device`) for every parameter of a rank, its hash checked first.

        Raises:
            IntegrityError: the file was changed.
            IncompatibleError: there is no such rank, or it was compiled for random weights.
        """
        self._check_rank(rank)
        name = layout.weights_file(rank)
        if not self.manifest.has_weights:
            raise IncompatibleError(
                f"{self.path} holds no weights, it was compiled with random ones; build it with "
                f"the model's own: {layout.rebuild_command(self.path)}"
            )
        self.verify([name])
        yield from read_weights(self.path / name, device=device)

    def artefact(self, key: str) -> Path:
        """The folder of an artefact, its hashes checked before the first use.

        Raises:
            IntegrityError: a file was changed.
            IncompatibleError: the bundle has no such artefact.
        """
        if key not in self.manifest.artefacts:
            raise IncompatibleError(
                f"{self.path} has no artefact {key}; it was compiled for other segments or "
                f"settings; build it: {layout.rebuild_command(self.path)}"
            )
        folder = layout.artefact_folder(key)
        self._check_once(folder)
        return self.path / folder

    def caches(self, rank: int) -> Path | None:
        """The folder of a rank's runtime caches, hashes checked; None where it has none.

        Raises:
            IntegrityError: a file was changed.
            IncompatibleError: there is no such rank.
        """
        self._check_rank(rank)
        folder = layout.cache_folder(rank)
        self._check_once(folder)
        return self.path / folder if self.manifest.files_below(folder) else None

    def faults(self, names: Collection[str] | None = None) -> list[Fault]:
        """The files that are not what the manifest says; all of them are hashed, or `names`."""
        files = self.manifest.files
        chosen = files if names is None else {name: files[name] for name in names}
        return find_faults(self.path, chosen)

    def verify(self, names: Collection[str] | None = None) -> None:
        """Raises IntegrityError: see `faults`."""
        self._refuse(self.faults(names))

    def _check_once(self, folder: str) -> None:
        if folder not in self._checked:
            self._refuse(self._strangers(folder))
            self.verify(self.manifest.files_below(folder))
            self._checked.add(folder)

    def _strangers(self, *folders: str) -> list[Fault]:
        """Files that the manifest does not know; a backend or a tokenizer might read one."""
        found = {name for folder in folders for name in list_files(self.path, folder)}
        strangers = sorted(found - set(self.manifest.files))
        return [Fault(name, "the manifest knows no such file") for name in strangers]

    def _check_owners(self, misfits: Collection[str]) -> None:
        """Every file of weights says itself that it is of this plan and of its rank."""
        for rank in self.plan.ranks if self.manifest.has_weights else ():
            name = layout.weights_file(rank.rank)
            try:
                owner, shapes = read_header(self.path / name)
            except IntegrityError as error:
                if name in misfits:  # absent or cut short; the caller says so more clearly
                    continue
                raise IntegrityError(f"{error}; {self._mend}") from None
            self._check_owner(name, rank, owner)
            for tensor in rank.tensors:
                if shapes.get(tensor.name) != tensor.shape:
                    raise IntegrityError(
                        f"{self.path}: {name} holds {tensor.name} with shape "
                        f"{shapes.get(tensor.name)}, the plan says {tensor.shape}; {self._mend}"
                    )

    def _check_owner(self, name: str, rank: RankPlan, owner: Owner | None) -> None:
        expected = Owner(self.manifest.plan_digest, rank.rank)
        if owner == expected:
            return
        shown = f"of rank {owner.rank}, plan {owner.plan[:12]}" if owner else "of no rank"
        raise IncompatibleError(
            f"{self.path}: {name} holds the weights {shown}; they must be of rank {rank.rank}, "
            f"plan {expected.plan[:12]}; {self._mend}"
        )

    def _check_rank(self, rank: int) -> None:
        if not 0 <= rank < len(self.plan.ranks):
            raise IncompatibleError(
                f"{self.path} was compiled for {len(self.plan.ranks)} ranks and has no rank "
                f"{rank}; start as many processes, or build it: {layout.rebuild_command(self.path)}"
            )

    def summary(self, faults: Sequence[Fault]) -> str:
        """One line that names the first of some faults, and what mends them."""
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        return f"{self.path}: {faults[0]}{more}; {self._mend}"

    def _refuse(self, faults: Sequence[Fault]) -> None:
        if faults:
            raise IntegrityError(self.summary(faults))

    @property
    def _mend(self) -> str:
        return _mend(self.path)


def _mend(path: Path) -> str:
    return f"copy the bundle again, or build it: {layout.rebuild_command(path)}"


def _check_access(path: Path) -> None:
    """Raises PreflightError: this user may not read something of what belongs to a bundle."""
    for name in (layout.MANIFEST, *layout.CONTENTS):
        if unreadable := find_unreadable(path / name):
            raise PreflightError(
                f"{unreadable}: user {os.getuid()} may not read it; make the bundle readable "
                f"(chmod -R a+rX {path}, and a+x on the folders above it), or run as its owner"
            )


def _check_folder(path: Path) -> None:
    """Raises IntegrityError: `path` is no finished bundle; says what it is instead."""
    partial = layout.partial_of(path)
    is_whole = (path / layout.MANIFEST).exists() and not (path / layout.FINISHED).exists()
    if path.suffix == ".partial" and path.is_dir() and not is_whole:
        raise IntegrityError(
            f"{path} is an unfinished bundle; finish it: "
            f"{layout.rebuild_command(path.with_suffix(''))}"
        )
    if not path.exists() and partial.exists():
        raise IntegrityError(
            f"{path} is not there; {partial} is an unfinished bundle; finish it: "
            f"{layout.rebuild_command(path)}"
        )
    if (path / "config.json").is_file() and not (path / layout.MANIFEST).exists():
        raise IntegrityError(
            f"{path} is no bundle but a model's folder; give it as --model, or make a bundle of "
            f"it: shardline compile --model {path} --output BUNDLE"
        )
    if not (path / layout.MANIFEST).is_file():
        problem = f"has no {layout.MANIFEST}" if path.is_dir() else "is no folder"
        raise IntegrityError(
            f"{path} is no bundle: it {problem}; make one: shardline compile --config PLAN.YAML "
            "--output BUNDLE"
        )


def _read_plan(path: Path, manifest: Manifest) -> ShardPlan:
    """The plan, which must be the one whose digest the manifest and every rank's file name."""
    try:
        plan = read_plan(manifest.plan)
        if plan.digest() != manifest.plan_digest:
            raise IntegrityError(
                f"plan has the digest {plan.digest()}, plan_digest is {manifest.plan_digest}"
            )
        if len(manifest.uses) != len(plan.ranks):
            raise IntegrityError(f"uses has {len(manifest.uses)} ranks, plan {len(plan.ranks)}")
        for name, entry in manifest.files.items():
            if entry.place != place_of(name, plan):
                raise IntegrityError(
                    f"files[{name}] has place {entry.place}, the plan says {place_of(name, plan)}"
                )
    except IntegrityError as error:
        raise IntegrityError(f"{path / layout.MANIFEST}: {error}; {_mend(path)}") from None
    return plan
