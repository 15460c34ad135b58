"""A folder takes the place of another so that a kill leaves one of them."""

from pathlib import Path

import pytest

from parallel.errors import ConfigError
from runner.bundle.durable import exchange
from runner.bundle.replacement import (
    check_target,
    finish_replacement,
    replace_folder,
    replace_in_two_steps,
)


def folder(path: Path, contents: str) -> Path:
    path.mkdir()
    (path / "manifest.json").write_text(contents)
    return path


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


@pytest.mark.parametrize("replace", [replace_folder, replace_in_two_steps])
def test_the_new_one_is_there_and_the_old_one_gone(replace, tmp_path: Path) -> None:
    new, out = folder(tmp_path / "out.partial", "new"), folder(tmp_path / "out", "old")
    replace(new, out)
    assert (out / "manifest.json").read_text() == "new"
    assert names(tmp_path) == ["out"]


def test_two_folders_swap_their_names(tmp_path: Path) -> None:
    first, second = folder(tmp_path / "a", "a"), folder(tmp_path / "b", "b")
    assert exchange(first, second)
    assert [(path / "manifest.json").read_text() for path in (first, second)] == ["b", "a"]
    with pytest.raises(FileNotFoundError):
        exchange(first, tmp_path / "absent")


def test_a_kill_between_two_steps_brings_the_old_one_back(tmp_path: Path) -> None:
    out = tmp_path / "out"
    folder(tmp_path / "out.replaced", "old")
    finish_replacement(out)
    assert (out / "manifest.json").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_a_kill_after_two_steps_leaves_the_new_one(tmp_path: Path) -> None:
    out = folder(tmp_path / "out", "new")
    folder(tmp_path / "out.replaced", "old")
    finish_replacement(out)
    assert (out / "manifest.json").read_text() == "new"
    assert names(tmp_path) == ["out"]
    finish_replacement(out)
    assert names(tmp_path) == ["out"]


def test_only_a_bundle_may_be_replaced(tmp_path: Path) -> None:
    precious = tmp_path / "home"
    precious.mkdir()
    check_target(precious, overwrite=False)
    (precious / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match="home is not empty"):
        check_target(precious, overwrite=False)
    with pytest.raises(ConfigError, match=r"home has no manifest\.json, so --overwrite does not"):
        check_target(precious, overwrite=True)
    with pytest.raises(ConfigError, match="/proc is a mount point"):
        check_target(Path("/proc"), overwrite=True)
