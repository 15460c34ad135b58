"""JSONL files are read a line at a time, and each line that cannot be used says why."""

import json
import tracemalloc
from pathlib import Path

import pytest

from parallel.errors import ConfigError
from runner.prompts import reading
from runner.prompts.prompt import BadLine, Place, Prompt
from runner.prompts.reading import PromptFiles


def write(path: Path, *lines: str | bytes) -> Path:
    encoded = [line.encode() if isinstance(line, str) else line for line in lines]
    path.write_bytes(b"\n".join(encoded))
    return path


def prompt(text: str = "x", **more: object) -> str:
    return json.dumps({"prompt": text, **more})


def reasons(path: Path) -> dict[int, str]:
    return {bad.place.line: bad.reason for bad in PromptFiles([path]) if isinstance(bad, BadLine)}


def test_lines_of_several_files_in_order_with_their_numbers(tmp_path: Path) -> None:
    first = write(tmp_path / "b.jsonl", "", prompt("1"), "   ", prompt("2\u2028"), "")
    second = write(tmp_path / "a.jsonl", prompt("3"))
    files = PromptFiles([first, second])
    found = [(line.place, line.content) for line in files if isinstance(line, Prompt)]
    assert found == [
        (Place("b.jsonl", 2), "1"),
        (Place("b.jsonl", 4), "2\u2028"),
        (Place("a.jsonl", 1), "3"),
    ]
    assert files.survey(5).num_lines == 3
    assert str(found[0][0]) == "b.jsonl, line 2"


def test_windows_files(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + prompt("1").encode() + b"\r", prompt("2"))
    assert [line.content for line in PromptFiles([path]) if isinstance(line, Prompt)] == ["1", "2"]


def test_bad_lines_between_good_ones(tmp_path: Path) -> None:
    deep = "[" * 100_000
    lines = ["{", b'{"prompt": "\xff"}', "[1]", "{}", deep]
    told = reasons(write(tmp_path / "a.jsonl", prompt(), *lines, prompt("\ud800")))
    assert list(told) == [2, 3, 4, 5, 6]
    assert told[2].startswith("it is not JSON: Expecting")
    assert told[3] == "it is not UTF-8 (byte 12)"
    assert told[4] == "it is a JSON list; it must be an object"
    assert told[5].startswith("give either prompt or messages")
    assert told[6].startswith("it is not JSON")


def test_an_id_is_used_once_in_all_files(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", prompt(id="x"), prompt(), prompt(), prompt(id=1))
    second = write(tmp_path / "b.jsonl", prompt(id="1"), prompt(custom_id="x"), prompt(id=1))
    bad = [line for line in PromptFiles([first, second]) if isinstance(line, BadLine)]
    assert bad == [
        BadLine(Place("b.jsonl", 2), "x", "the id 'x' is that of an earlier line"),
        BadLine(Place("b.jsonl", 3), 1, "the id 1 is that of an earlier line"),
    ]


def test_a_line_that_is_too_long_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "MAX_LINE_BYTES", 100)
    just = prompt("x" * (100 - len(prompt("")) - 1))
    path = write(tmp_path / "a.jsonl", just, prompt("y" * 1000), prompt("z"), prompt("w" * 100))
    told = reasons(path)
    assert list(told) == [2, 4]
    assert "more than the 100 bytes" in told[2]


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("w") as file:
        for index in range(20_000):
            file.write(prompt("x" * 500, id=f"a rather long id {index}") + "\n")
    files = PromptFiles([path])
    tracemalloc.start()
    assert sum(isinstance(line, Prompt) for line in files) == 20_000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert path.stat().st_size > 10e6
    assert peak < 1e6


def test_files_that_cannot_be_used_are_told_at_once(tmp_path: Path) -> None:
    good = write(tmp_path / "a.jsonl", prompt())
    (tmp_path / "other").mkdir()
    other = write(tmp_path / "other" / "a.jsonl", prompt())
    blank = write(tmp_path / "blank.jsonl", "", "  ", "")
    for paths, told in [
        ([good, tmp_path / "absent.jsonl"], "cannot read .*absent.jsonl: No such file"),
        ([good, tmp_path], "cannot read .*: Is a directory"),
        ([good, other], r"are both named a\.jsonl"),
        ([good, good], r"are both named a\.jsonl"),
        ([blank], r"there are no prompts in .*blank\.jsonl"),
    ]:
        with pytest.raises(ConfigError, match=told):
            PromptFiles(paths)
    assert PromptFiles([good, blank]).survey(5).num_lines == 1


def test_no_request_is_longer_than_the_survey_says(tmp_path: Path) -> None:
    short, long = prompt("x" * 70), prompt(max_tokens=60)
    body = {"messages": [], "max_completion_tokens": 500}
    for lines, expected in [
        ([short, "\n"], len(short) + 1 + 5),
        ([short, long], len(long) + 60),
        ([long, json.dumps({"body": body}), short], len(json.dumps({"body": body})) + 1 + 500),
    ]:
        path = write(tmp_path / "a.jsonl", *lines)
        assert PromptFiles([path]).survey(5).max_length == expected


def test_digests_tell_files_apart(tmp_path: Path) -> None:
    one, two = write(tmp_path / "1", prompt("1")), write(tmp_path / "2", prompt("2"))
    digests = PromptFiles([two, one]).digests()
    assert list(digests) == ["2", "1"]
    assert len(set(digests.values())) == 2
