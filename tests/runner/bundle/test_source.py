"""A checkpoint's files are named by what they hold."""

import hashlib
from pathlib import Path

from runner.bundle.source import SourceFile, read_source, source_digest


def test_files_are_known_by_their_names_and_hashes(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / name).write_text(name * 3)
    found = read_source([tmp_path / "b", tmp_path / "a", tmp_path / "b"])
    assert found == {n: SourceFile(3, hashlib.sha256((n * 3).encode()).hexdigest()) for n in "ab"}
    assert list(found) == ["a", "b"]


def test_a_digest_names_names_and_contents_in_any_order() -> None:
    first, second = SourceFile(1, "0" * 64), SourceFile(1, "1" * 64)
    digest = source_digest({"a": first, "b": second})
    assert digest == source_digest({"b": second, "a": first})
    others = [{"a": first}, {"a": second, "b": first}, {"a": first, "c": second}]
    assert digest not in [source_digest(other) for other in others]
