"""Each prompt has one line in a folder, whatever ends the run that writes it."""

import json
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from processes import ROOT

from parallel.errors import ConfigError, IntegrityError, PreflightError
from runner.prompts.folder import PromptFolder, open_prompt_folder
from runner.prompts.prompt import Answer, BadLine, Place, Prompt
from runner.prompts.results import result_of
from runner.text.generation_options import GenerationOptions

A, B, C = Place("a.jsonl", 1), Place("a.jsonl", 9), Place("b.jsonl", 1)


def opened(
    folder: Path, model: str = "m1", *, overwrite: bool = False
) -> AbstractContextManager[PromptFolder]:
    return open_prompt_folder(folder, {"model": model}, overwrite=overwrite)


def result(place: Place, text: str = "said", endpoint: Any = None) -> dict[str, Any]:
    prompt = Prompt(place, None, "x", GenerationOptions(), endpoint)
    return result_of(prompt, Answer(text, "stop", 1, 1), model="m")


def lines(folder: Path, name: str = "results.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_bytes().splitlines()]


def test_what_was_told_is_known_by_the_next_run(tmp_path: Path) -> None:
    with opened(tmp_path / "out") as folder:
        folder.write(result(A, "né\n🙂"))
        folder.write(result(C, endpoint="/v1/completions"))
        folder.record_failure(BadLine(B, 7, "it is\nbad \ud800"))
        assert [folder.has(place) for place in (A, B, C, Place("a.jsonl", 2))] == [1, 1, 1, 0]
    with opened(tmp_path / "out") as folder:
        assert [folder.has(place) for place in (A, B, C, Place("a.jsonl", 2))] == [1, 1, 1, 0]
        assert not folder.has(Place("c.jsonl", 1))
        assert (folder.num_finished, folder.num_failed) == (2, 1)
        assert folder.first_failure == "a.jsonl, line 9: it is bad \ud800"
    assert lines(tmp_path / "out")[0]["text"] == "né\n🙂"
    (failure,) = lines(tmp_path / "out", "errors.jsonl")
    assert failure == {"id": 7, "file": "a.jsonl", "index": 9, "error": "it is bad \ud800"}


@pytest.mark.parametrize("torn", [b'{"id": null, "file": "a.js', b"\0" * 200_000, b"\xff"])
def test_a_torn_line_is_written_again(tmp_path: Path, torn: bytes) -> None:
    with opened(tmp_path) as folder:
        folder.write(result(A))
    for name in ("results.jsonl", "errors.jsonl"):
        with (tmp_path / name).open("ab") as file:
            file.write(torn)
    with opened(tmp_path) as folder:
        assert (folder.has(A), folder.has(B)) == (True, False)
        folder.write(result(B))
        folder.record_failure(BadLine(C, None, "bad"))
    assert [(line["file"], line["index"]) for line in lines(tmp_path)] == [A, B]
    assert len(lines(tmp_path, "errors.jsonl")) == 1


@pytest.mark.parametrize("line", ["[]", "{}", "no", '{"id": 3}', '{"file": "a", "index": "x"}'])
def test_a_line_of_someone_else_is_named(tmp_path: Path, line: str) -> None:
    with opened(tmp_path) as folder:
        folder.write(result(A))
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(IntegrityError, match=r"results\.jsonl, line 2 .*; remove it"):
        opened(tmp_path).__enter__()


def test_a_folder_has_results_of_one_run(tmp_path: Path) -> None:
    with opened(tmp_path) as folder:
        folder.write(result(A))
    with pytest.raises(ConfigError, match='of a run with model="m1", this one has "m2"'):
        opened(tmp_path, "m2").__enter__()
    assert len(lines(tmp_path)) == 1
    with opened(tmp_path, "m2", overwrite=True) as folder:
        assert (folder.has(A), folder.num_finished) == (False, 0)
    assert lines(tmp_path) == []


def test_one_run_at_a_time(tmp_path: Path) -> None:
    with opened(tmp_path), pytest.raises(PreflightError, match=r"another run .* writes"):
        opened(tmp_path).__enter__()


FILL = """
import resource, sys
from pathlib import Path
from runner.prompts.folder import open_prompt_folder
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
with open_prompt_folder(Path(sys.argv[1]), {"model": "m1"}, overwrite=False) as folder:
    for line in range(1, 100):
        folder.write({"file": "a.jsonl", "index": line, "text": "x" * 100})
"""


def test_a_disk_that_is_full_leaves_whole_lines(tmp_path: Path) -> None:
    """A limit on the size of a file, here in the middle of a line, ends a write as a full disk."""
    ended = subprocess.run(
        [sys.executable, "-c", FILL, str(tmp_path), "1000"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "PreflightError: cannot write" in ended.stderr
    assert "results.jsonl: File too large" in ended.stderr
    told = [line["index"] for line in lines(tmp_path)]
    assert 3 < len(told) < 99
    with opened(tmp_path) as folder:
        assert [line for line in range(1, 100) if folder.has(Place("a.jsonl", line))] == told
