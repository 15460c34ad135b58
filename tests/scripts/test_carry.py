"""`scripts/carry`: whatever happens to a sealed folder on its way is found and named."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from bundles import flip
from processes import ROOT

FILES = {"a.bin": b"a" * 5000, "below/b.txt": b"text\n", "below/with space": b"\0\1"}


def carry(*arguments: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ROOT / "scripts" / "carry", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, data in FILES.items():
        path = tmp_path / "kit" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    assert carry("seal", tmp_path / "kit").returncode == 0
    return tmp_path / "kit"


def test_what_was_sealed_is_whole(folder: Path) -> None:
    done = carry("verify", folder)
    assert done.returncode == 0, done.stderr
    assert f"{len(FILES)} files" in done.stdout


@pytest.mark.parametrize("name", [*FILES])
def test_a_flipped_byte_in_any_file_is_named(folder: Path, name: str) -> None:
    flip(folder / name, -1)
    done = carry("verify", folder)
    assert done.returncode == 4
    assert f"carry: ./{name}: was changed" in done.stderr
    assert done.stderr.count("was changed") == 1


def remove(folder: Path) -> None:
    (folder / "a.bin").unlink()


def add(folder: Path) -> None:
    (folder / "new").write_text("x")


def link(folder: Path) -> None:
    (folder / "link").symlink_to("/etc/passwd")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (remove, "./a.bin: is missing"),
        (add, "./new: was added"),
        (link, "./link: is a symbolic link"),
    ],
)
def test_other_changes_are_named(folder: Path, change: Callable[[Path], None], said: str) -> None:
    change(folder)
    done = carry("verify", folder)
    assert done.returncode == 4
    assert said in done.stderr


def test_signatures(folder: Path, keys: tuple[Path, Path]) -> None:
    private, public = keys
    asked = ["verify", folder, "--public-key", public]
    assert "is not signed" in carry(*asked).stderr
    assert carry("seal", folder, "--key", private).returncode == 0
    assert carry(*asked).returncode == 0
    # One who changes a file and the sums, too, has no key.
    flip(folder / "a.bin", 0)
    (folder / "SHA256SUMS.sig").rename(folder.parent / "old.sig")
    assert carry("seal", folder).returncode == 0
    shutil.move(folder.parent / "old.sig", folder / "SHA256SUMS.sig")
    assert carry("verify", folder).returncode == 0
    done = carry(*asked)
    assert done.returncode == 4
    assert "is no signature of it" in done.stderr


def test_parts_are_checked_and_joined(folder: Path, tmp_path: Path) -> None:
    assert carry("split", folder, "4K").returncode == 0
    parts = sorted(tmp_path.glob("kit.tar.[0-9]*"))
    assert len(parts) > 2
    assert all(part.stat().st_size <= 4096 for part in parts)
    there = tmp_path / "there"
    there.mkdir()
    done = carry("join", tmp_path / "kit.tar.sha256", cwd=there)
    assert done.returncode == 0, done.stderr
    assert {name: (there / "kit" / name).read_bytes() for name in FILES} == FILES
    assert carry("verify", there / "kit").returncode == 0
    assert "is there already" in carry("join", tmp_path / "kit.tar.sha256", cwd=there).stderr

    shutil.rmtree(there / "kit")
    flip(parts[1], 100)
    parts[2].unlink()
    done = carry("join", tmp_path / "kit.tar.sha256", cwd=there)
    assert done.returncode == 4
    assert f"{parts[1].name}: was changed" in done.stderr
    assert f"{parts[2].name}: is missing" in done.stderr
    assert not (there / "kit").exists()
