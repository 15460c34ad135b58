"""How far a rank is: text for a person, JSON for a log."""

import io
import json
import time

import pytest

from runner.build.progress import Progress, announce


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_line_of_json_a_segment_where_no_one_watches() -> None:
    stream = io.StringIO()
    progress = Progress(3, 2, stream)
    progress.finished("qkv x 1", how="inductor")
    progress.finished("qkv x 8", how="kept")
    first, second = (json.loads(line) for line in stream.getvalue().splitlines())
    assert first | {"elapsed_s": 0, "remaining_s": 0} == {
        "event": "segment",
        "rank": 3,
        "done": 1,
        "total": 2,
        "percent": 50.0,
        "elapsed_s": 0,
        "remaining_s": 0,
        "segment": "qkv x 1",
        "how": "inductor",
    }
    assert first["remaining_s"] == first["elapsed_s"] >= 0
    assert (second["done"], second["percent"], second["remaining_s"]) == (2, 100.0, 0.0)
    assert second["how"] == "kept"


def test_a_line_of_text_on_a_terminal() -> None:
    stream = Terminal()
    Progress(0, 4, stream).finished("head x 16", how="eager")
    (line,) = stream.getvalue().splitlines()
    assert line.startswith("rank 0: segment 1 of 4, 25 %, 0 s, 0 s to go: head x 16 (eager)")


def test_a_phase_says_how_long_after_the_start(capsys: pytest.CaptureFixture[str]) -> None:
    announce("compiling", started_s=time.monotonic() - 2.5)
    told = json.loads(capsys.readouterr().err)
    assert 2.5 <= told.pop("elapsed_s") < 4
    assert told == {"event": "phase", "phase": "compiling"}
