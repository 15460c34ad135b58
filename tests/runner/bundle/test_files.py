"""A file's hash is that of its bytes, however it is read; only plain files inside count."""

import hashlib
import os
import random
from dataclasses import replace
from pathlib import Path

import pytest

from runner.bundle.files import (
    CHUNK_BYTES,
    FileHash,
    Hasher,
    find_faults,
    find_misfits,
    hash_file,
    hash_files,
    list_files,
    path_problem,
)

SIZES = [0, 1, 5_000_000, CHUNK_BYTES, CHUNK_BYTES + 1, 2 * CHUNK_BYTES]


def write_random(path: Path, size: int) -> bytes:
    data = random.Random(size).randbytes(min(size, 1000)) * (size // 1000 + 1)
    path.write_bytes(data[:size])
    return data[:size]


@pytest.mark.parametrize("size", SIZES)
def test_a_hash_is_that_of_the_whole_and_of_every_chunk(size: int, tmp_path: Path) -> None:
    data = write_random(tmp_path / "file", size)
    found = hash_file(tmp_path / "file")
    starts = range(0, size, CHUNK_BYTES) if size > CHUNK_BYTES else ()
    chunks = tuple(hashlib.sha256(data[s : s + CHUNK_BYTES]).hexdigest() for s in starts)
    assert found == FileHash(size, hashlib.sha256(data).hexdigest(), chunks)
    assert find_faults(tmp_path, {"file": found}) == []


def test_a_hash_does_not_depend_on_how_the_bytes_come() -> None:
    data = memoryview(random.Random(0).randbytes(1000) * 70_000)
    whole, parts = Hasher(), Hasher()
    whole.update(data)
    for start in range(0, len(data), 9_999_991):
        parts.update(data[start : start + 9_999_991])
    assert whole.finish() == parts.finish()
    assert len(whole.finish().chunks) == 2


@pytest.mark.parametrize("offset", [0, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 70])
def test_a_changed_byte_is_found_in_its_chunk(offset: int, tmp_path: Path) -> None:
    file = tmp_path / "file"
    write_random(file, CHUNK_BYTES + 71)
    expected = {"file": hash_file(file)}
    with file.open("r+b") as opened:
        opened.seek(offset)
        byte = opened.read(1)[0]
        opened.seek(offset)
        opened.write(bytes([byte ^ 1]))
    (fault,) = find_faults(tmp_path, expected)
    start = offset // CHUNK_BYTES * CHUNK_BYTES
    stop = min(start + CHUNK_BYTES, CHUNK_BYTES + 71)
    assert f"file: sha256 of bytes {start} to {stop} is" in str(fault)
    assert expected["file"].chunks[start // CHUNK_BYTES][:16] in str(fault)


def test_many_files_are_hashed_in_order(tmp_path: Path) -> None:
    paths = [tmp_path / str(number) for number in range(40)]
    for number, path in enumerate(paths):
        path.write_text(str(number))
    sums = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(40)]
    assert [found.sha256 for found in hash_files(paths)] == sums


def test_what_is_no_file_is_told_from_what_is_absent(tmp_path: Path) -> None:
    entry = FileHash(3, hashlib.sha256(b"abc").hexdigest())
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")  # would be waited for if it were opened
    (tmp_path / "short").write_bytes(b"ab")
    (tmp_path / "good").write_bytes(b"abc")
    names = ["absent", "folder", "pipe", "short", "good"]
    assert [str(fault) for fault in find_faults(tmp_path, dict.fromkeys(names, entry))] == [
        "absent: it is absent",
        "folder: it is no file",
        "pipe: it is no file",
        "short: it has 2 bytes, the manifest says 3",
    ]
    assert find_misfits(tmp_path, {"good": replace(entry, sha256="0" * 64)}) == []


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "..", "a/../../b", "../bundle2/a", "./a", "a//b", "a/", "", "a\0b"]
)
def test_a_path_that_is_not_plain_is_refused(name: str, tmp_path: Path) -> None:
    problem = "it is no plain path inside the bundle"
    assert path_problem(tmp_path / "bundle", name) == problem
    (fault,) = find_faults(tmp_path / "bundle", {name: FileHash(0, "")})
    assert fault.problem == problem


def test_a_link_may_not_lead_out(tmp_path: Path) -> None:
    bundle, outside = tmp_path / "bundle", tmp_path / "outside"
    outside.mkdir()
    bundle.mkdir()
    (outside / "file").write_text("x")
    (bundle / "file").symlink_to(outside / "file")
    (bundle / "folder").symlink_to(outside)
    (bundle / "own").symlink_to("real")
    (bundle / "real").write_text("x")
    for name in ("file", "folder/file"):
        assert path_problem(bundle, name) == "it is a link that leads out of the bundle"
    assert path_problem(bundle, "own") is None


def test_a_bundle_may_itself_be_reached_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "real" / "file").write_text("x")
    assert path_problem(tmp_path / "link", "file") is None


def test_files_are_listed_at_every_depth_and_links_with_them(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c").write_text("")
    (tmp_path / "a" / "link").symlink_to("b")
    (tmp_path / "d").write_text("")
    assert list_files(tmp_path, "a") == {"a/b/c", "a/link"}
    assert list_files(tmp_path, "absent") == set()
