"""A finished folder takes its name, in place of an old bundle if there is one.

At every instant there is the old bundle or the new one, where the file system can exchange two
folders (ext4, xfs, btrfs, tmpfs and others can). Where it cannot, a kill between two renames
leaves the old one aside, and the next compile puts it back.
"""

from pathlib import Path

from runner.bundle.durable import exchange, flush, remove
from runner.bundle.layout import MANIFEST, replaced_of
from runner.config.output_folder import check_output_folder


def check_target(out: Path, *, overwrite: bool) -> None:
    """Raises ConfigError: something is at `out` that may not be replaced."""
    check_output_folder(out, overwrite=overwrite, marker=MANIFEST)


def replace_folder(new: Path, out: Path) -> None:
    """Give `new` the name `out`; what has that name now is removed."""
    flush(new)
    if not out.exists() or not any(out.iterdir()):
        new.rename(out)
    elif exchange(new, out):
        remove(new)
    else:
        replace_in_two_steps(new, out)
    flush(out.parent)


def replace_in_two_steps(new: Path, out: Path) -> None:
    """For file systems that cannot exchange; see `finish_replacement`."""
    aside = replaced_of(out)
    remove(aside)
    out.rename(aside)
    new.rename(out)
    remove(aside)


def finish_replacement(out: Path) -> None:
    """After a kill within `replace_in_two_steps`: put the old bundle back, or remove it."""
    aside = replaced_of(out)
    if not aside.exists():
        return
    if out.exists():
        remove(aside)
    else:
        aside.rename(out)
