"""The start of a process: what it reports, and what becomes of one that fails."""

import json
import os
import sys
import time

import pytest

from runner.bench.startup import FirstTokenFront, StartError, time_start
from runner.bench.workload import Workload
from runner.engine.scheduler import Output

SAY_TIMES = """
import json, time
time.sleep(0.3)
made = time.monotonic()
print(json.dumps({"ends": {"process": made, "loading": made + 1, "first_step": made + 3}}))
"""


def start(code: str) -> tuple[float, dict[str, float]]:
    timed = time_start([sys.executable, "-c", code], os.environ)
    return timed.seconds, timed.phases_s


def test_phases_are_what_lies_between_their_ends() -> None:
    seconds, phases = start(SAY_TIMES)
    assert list(phases) == ["process", "loading", "first_step"]
    assert 0.3 < phases["process"] < seconds < 30
    assert (phases["loading"], phases["first_step"]) == pytest.approx((1, 2))


def test_the_clock_stops_at_the_report_not_at_the_end() -> None:
    started = time.monotonic()
    seconds, _ = start(f"{SAY_TIMES}\nsys = __import__('sys'); sys.stdout.flush()\ntime.sleep(1)")
    assert seconds < time.monotonic() - started - 0.9


def test_a_process_that_fails_gives_its_last_line_and_exit_code() -> None:
    code = "import sys; sys.stderr.write('first\\nshardline: no memory\\n'); sys.exit(6)"
    with pytest.raises(StartError, match=r"^no memory$") as caught:
        start(code)
    assert caught.value.exit_code == 6


def test_a_process_that_ends_well_without_a_token_is_an_error() -> None:
    with pytest.raises(StartError, match="the process said nothing") as caught:
        start("")
    assert caught.value.exit_code == 1


def test_the_front_reports_when_all_have_their_token() -> None:
    lines: list[str] = []
    front = FirstTokenFront(Workload(1, 4, 1), vocab_size=9, max_num_seqs=8, report=lines.append)
    assert front.kv_blocks(16) == 1
    (request,) = front.next().added
    front.take([])  # a prompt in chunks
    assert (front.next().added, front.next().leave, lines) == ([], False, [])
    front.take([Output(request.request_id, 1, "length")])
    assert front.next().leave
    ends = json.loads(lines[0])["ends"]
    assert list(ends) == ["process", "loading", "allocating", "first_step"]
    assert list(ends.values()) == sorted(ends.values())
