"""What folders, files and lists name, and what is refused."""

import logging
from pathlib import Path

import pytest

from parallel.errors import ConfigError
from runner.items.item import Item, suffix_of
from runner.items.listing import list_items


def make(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def names(items: list[Item]) -> list[str]:
    return [item.name for item in items]


def test_a_folder_is_searched_in_order_without_hidden_files(tmp_path: Path) -> None:
    make(tmp_path, "b.PNG", "sub/scan1.nii.gz", "a.npy", ".hidden.npy", ".git/x.npy", "sub/c.npz")
    items = list_items([tmp_path])
    assert [(item.name, item.kind) for item in items] == [
        ("a", "array"),
        ("b", "image"),
        ("sub/c", "archive"),
        ("sub/scan1", "volume"),
    ]
    assert items[3].path == tmp_path / "sub/scan1.nii.gz"


def test_the_longest_suffix_counts() -> None:
    assert suffix_of("a.b.NII.GZ") == ".nii.gz"
    assert suffix_of("a.nii") == ".nii"
    assert suffix_of("a.gz") == suffix_of(".npy") == suffix_of("npy") == ""


def test_unknown_files_of_a_folder_are_told_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make(tmp_path, "a.npy", "notes.md", "table.csv")
    with caplog.at_level(logging.WARNING):
        assert names(list_items([tmp_path])) == ["a"]
    assert len(caplog.records) == 1
    assert "left out 2 of 3 files (notes.md for example)" in caplog.text


def test_links_are_followed_and_loops_end(tmp_path: Path) -> None:
    make(tmp_path, "data/a.npy", "elsewhere/b.npy")
    (tmp_path / "data/up").symlink_to(tmp_path / "data")
    (tmp_path / "data/linked").symlink_to(tmp_path / "elsewhere")
    assert names(list_items([tmp_path / "data"])) == ["a", "linked/b"]


def test_a_list_is_relative_to_its_own_folder(tmp_path: Path) -> None:
    make(tmp_path, "lists/sub/a.npy", "b.npy", "c.npy")
    file = tmp_path / "lists/all.txt"
    file.write_text(f"sub/a.npy\n\n ../b.npy \n{tmp_path}/c.npy\n")
    assert names(list_items([file])) == ["sub/a", "b", "c"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a.npy\nb.npy\n", "all.txt, line 2: b.npy is absent"),
        (b"a.npy\nsub\n", "all.txt, line 2: sub is no file"),
        (b"a.npy\nnotes.md\n", "all.txt, line 2: notes.md is of no kind that is read"),
        (b"a\xff.npy\n", "not UTF-8"),
    ],
)
def test_a_bad_list(tmp_path: Path, content: bytes, message: str) -> None:
    make(tmp_path, "a.npy", "notes.md", "sub/x.npy")
    (tmp_path / "all.txt").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        list_items([tmp_path / "all.txt"])


def test_two_items_of_one_name_are_both_named(tmp_path: Path) -> None:
    make(tmp_path, "one/a.npy", "two/a.png")
    with pytest.raises(ConfigError, match=r"one/a\.npy and .*two/a\.png are both named 'a'"):
        list_items([tmp_path / "one", tmp_path / "two"])
    with pytest.raises(ConfigError, match="both named 'a'"):
        list_items([tmp_path / "one", tmp_path / "one/a.npy"])


def test_absent_unknown_and_empty(tmp_path: Path) -> None:
    make(tmp_path, "notes.md")
    with pytest.raises(ConfigError, match="absent does not exist"):
        list_items([tmp_path / "absent"])
    with pytest.raises(ConfigError, match=r"notes\.md is of no kind"):
        list_items([tmp_path / "notes.md"])
    with pytest.raises(ConfigError, match="there are no items in"):
        list_items([tmp_path])


def test_results_may_not_lie_among_the_inputs(tmp_path: Path) -> None:
    make(tmp_path, "in/a.npy")
    with pytest.raises(ConfigError, match="lies in the input folder"):
        list_items([tmp_path / "in"], output=tmp_path / "in/out")
    assert names(list_items([tmp_path / "in"], output=tmp_path / "out")) == ["a"]
