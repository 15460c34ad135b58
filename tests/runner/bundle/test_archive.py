"""Bundles that are carried: packed, split, unpacked, and what may happen to them on the way."""

import hashlib
import io
import tarfile
from pathlib import Path

import pytest
from bundles import flip, tree

from parallel.errors import ConfigError, IntegrityError
from runner.bundle.archive import check_parts, pack, sums_of, unpack
from runner.bundle.bundle import Bundle


@pytest.mark.parametrize("part_bytes", [None, 1000, 4096, 10**9])
def test_a_bundle_comes_out_as_it_went_in(
    bundle: Path, tmp_path: Path, part_bytes: int | None
) -> None:
    archive, out = tmp_path / "a.tar", tmp_path / "out"
    parts = pack(bundle, archive, part_bytes=part_bytes)
    sizes = [part.stat().st_size for part in parts]
    assert all(size == part_bytes for size in sizes[:-1])
    assert part_bytes is None or 0 < sizes[-1] <= part_bytes
    unpack(archive, out)
    assert tree(out) == tree(bundle)
    Bundle.open(out).verify()


def test_packing_twice_gives_the_same_bytes(bundle: Path, tmp_path: Path) -> None:
    pack(bundle, tmp_path / "a.tar")
    (bundle / "manifest.json").touch()
    pack(bundle, tmp_path / "b.tar")
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()


def test_the_list_of_parts_is_that_of_sha256sum(bundle: Path, tmp_path: Path) -> None:
    parts = pack(bundle, tmp_path / "a.tar", part_bytes=5000)
    expected = [f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.name}" for p in parts]
    assert sums_of(tmp_path / "a.tar").read_text().splitlines() == expected


def test_a_part_that_was_changed_is_named_and_nothing_is_unpacked(
    bundle: Path, tmp_path: Path
) -> None:
    parts = pack(bundle, tmp_path / "a.tar", part_bytes=5000)
    flip(parts[1], 77)
    with pytest.raises(IntegrityError, match=r"a\.tar\.001 was changed"):
        unpack(tmp_path / "a.tar", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_part_that_is_missing_is_named(bundle: Path, tmp_path: Path) -> None:
    parts = pack(bundle, tmp_path / "a.tar", part_bytes=5000)
    parts[0].unlink()
    with pytest.raises(IntegrityError, match=r"a\.tar\.000 is missing"):
        check_parts(tmp_path / "a.tar")
    sums_of(tmp_path / "a.tar").unlink()
    with pytest.raises(IntegrityError, match="cannot be read"):
        check_parts(tmp_path / "a.tar")


def test_nothing_is_overwritten(bundle: Path, tmp_path: Path) -> None:
    archive = tmp_path / "a.tar"
    pack(bundle, archive)
    with pytest.raises(ConfigError, match="is there already"):
        pack(bundle, archive)
    with pytest.raises(ConfigError, match="is there already"):
        unpack(archive, bundle)


@pytest.mark.parametrize("name", ["/etc/x", "b/../../x", "b", "../x/y"])
def test_names_that_lead_elsewhere_are_refused(tmp_path: Path, name: str) -> None:
    archive = write_archive(tmp_path, tarfile.TarInfo(name))
    with pytest.raises(IntegrityError, match="which no bundle holds"):
        unpack(archive, tmp_path / "below" / "out")
    assert not (tmp_path / "below" / "out").exists()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_what_is_no_plain_file_is_refused(tmp_path: Path, kind: bytes) -> None:
    info = tarfile.TarInfo("b/model/x")
    info.type, info.linkname = kind, "/etc/passwd"
    with pytest.raises(IntegrityError, match="which no bundle holds"):
        unpack(write_archive(tmp_path, info), tmp_path / "out")


def test_what_is_no_archive_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"nonsense" * 100)
    write_sums(tmp_path / "a.tar")
    with pytest.raises(IntegrityError, match="is no archive of a bundle"):
        unpack(tmp_path / "a.tar", tmp_path / "out")


def write_archive(folder: Path, info: tarfile.TarInfo) -> Path:
    """One member, with right sums: what somebody who makes archives could send."""
    info.size = 0 if info.type != tarfile.REGTYPE else 3
    with tarfile.open(folder / "a.tar", "w") as tar:
        tar.addfile(info, io.BytesIO(b"abc"))
    write_sums(folder / "a.tar")
    return folder / "a.tar"


def write_sums(archive: Path) -> None:
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    sums_of(archive).write_text(f"{digest}  {archive.name}\n")
