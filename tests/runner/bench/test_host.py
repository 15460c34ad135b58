"""The commit of a source tree, where there is one."""

import subprocess
from pathlib import Path

import pytest

from runner.bench.host import read_commit


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """One commit with one file, and a tag that must not hide it."""

    def git(*arguments: str) -> None:
        name = ["-c", "user.name=t", "-c", "user.email=t@t"]
        subprocess.run(["git", *name, *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-m", "one")
    git("tag", "-a", "v1", "-m", "v1")
    return tmp_path


def head(folder: Path) -> str:
    command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_a_commit_and_whether_files_differ_from_it(checkout: Path) -> None:
    commit = head(checkout)
    assert read_commit(checkout) == commit[:12]
    (checkout / "new").write_text("not tracked")
    assert read_commit(checkout) == commit[:12]
    (checkout / "file").write_text("two")
    assert read_commit(checkout) == f"{commit[:12]}-dirty"


def test_no_commit_without_a_checkout_of_its_own(checkout: Path) -> None:
    inner = checkout / "inner"
    inner.mkdir()
    assert read_commit(inner) is None


def test_no_commit_without_git(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(checkout))
    assert read_commit(checkout) is None
