"""The guard in processes of its own, since a hook of the interpreter stays for good."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from processes import ROOT

from runner.observe.network_guard import find_fence, is_allowed

AWAY = "('192.0.2.1', 9)"
"""An address of documentation, which is nobody's."""


@pytest.mark.parametrize(
    ("family", "address", "allowed"),
    [
        (socket.AF_INET, ("127.0.0.1", 80), True),
        (socket.AF_INET, ("127.9.9.9", 80), True),
        (socket.AF_INET, ("0.0.0.0", 80), True),
        (socket.AF_INET, ("localhost", 80), True),
        (socket.AF_INET, ("192.0.2.1", 80), False),
        (socket.AF_INET, ("example.invalid", 80), False),
        (socket.AF_INET6, ("::1", 80, 0, 0), True),
        (socket.AF_INET6, ("::ffff:127.0.0.1", 80, 0, 0), True),
        (socket.AF_INET6, ("::ffff:192.0.2.1", 80, 0, 0), False),
        (socket.AF_INET6, ("fe80::1%eth0", 80, 0, 0), False),
        (socket.AF_UNIX, "/run/x", True),
        (socket.AF_PACKET, ("eth0", 0), False),
        (socket.AF_INET, None, True),
    ],
)
def test_who_may_be_reached(family: int, address: Any, allowed: bool) -> None:
    assert is_allowed(family, address) is allowed


def test_peers_of_the_job_may_be_reached() -> None:
    assert is_allowed(socket.AF_INET, ("192.0.2.7", 1), frozenset({"192.0.2.7"}))


def test_the_fence_is_a_namespace_with_loopback_alone() -> None:
    assert find_fence({"lo": True, "sit0": False}) == "network namespace with loopback alone"
    assert find_fence({"lo": True, "sit0": True}) == "none: this network has sit0"
    assert find_fence({"lo": True, "eth0": False}) == "none: this network has eth0"


def guarded(
    code: str, mode: str, report: Path | None, **environment: str
) -> subprocess.CompletedProcess[str]:
    lines = [
        "from runner.observe.network_guard import guard_network, count_events",
        f"guard_network({mode!r}, report={report and str(report)!r})",
        "import socket, subprocess, sys",
        code,
    ]
    return subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def events(report: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in report.read_text().splitlines()]


@pytest.mark.parametrize(
    ("code", "whom"),
    [
        (f"socket.create_connection({AWAY}, 1)", "192.0.2.1 port 9"),
        (
            f"socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', {AWAY})",
            "192.0.2.1 port 9",
        ),
        ("socket.getaddrinfo('example.invalid', 80)", "example.invalid by DNS"),
        (
            "import urllib.request; urllib.request.urlopen('http://example.invalid/')",
            "example.invalid by DNS",
        ),
    ],
)
def test_strict_refuses_and_reports_with_the_stack(code: str, whom: str, tmp_path: Path) -> None:
    report = tmp_path / "report.jsonl"
    done = guarded(code, "strict", report)
    assert done.returncode == 1
    assert f"the network guard refused a connection to {whom}" in done.stderr
    head, event = events(report)
    assert head["guard"] == "strict"
    assert head["fence"] == find_fence()
    assert (event["refused"], event["to"]) == (True, whom)
    assert event["stack"][0].startswith("<string>:")


def test_children_are_guarded_before_their_own_code_runs(tmp_path: Path) -> None:
    report = tmp_path / "report.jsonl"
    child = f"import socket; socket.create_connection({AWAY}, 1)"
    grandchild = (
        f"child = [sys.executable, '-c', {child!r}]\n"
        "done = subprocess.run(child, capture_output=True, text=True)\n"
        "print(done.returncode, done.stderr.splitlines()[-1]); print(count_events())"
    )
    done = guarded(grandchild, "strict", report)
    assert "1 runner.observe.network_guard.NetworkRefusedError" in done.stdout
    assert "Counts(refused=1, seen=0)" in done.stdout
    assert len({event["pid"] for event in events(report)}) == 2


def test_warn_tells_and_lets_pass(tmp_path: Path) -> None:
    report = tmp_path / "report.jsonl"
    send = f"socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'', {AWAY})"
    # The packet is empty, and whether a route takes it is no matter here.
    done = guarded(f"try:\n {send}\nexcept OSError: pass\nprint(count_events())", "warn", report)
    assert done.returncode == 0, done.stderr
    assert "the network guard saw a connection to 192.0.2.1 port 9" in done.stderr
    assert "Counts(refused=0, seen=1)" in done.stdout


def test_loopback_and_unix_sockets_pass_in_silence(tmp_path: Path) -> None:
    code = (
        "server = socket.create_server(('127.0.0.1', 0))\n"
        "socket.create_connection(('localhost', server.getsockname()[1])).close()\n"
        "a, b = socket.socketpair()\n"
        "print(count_events())"
    )
    done = guarded(code, "strict", tmp_path / "report.jsonl")
    assert done.returncode == 0, done.stderr
    assert "Counts(refused=0, seen=0)" in done.stdout
    assert "guard" not in done.stderr


def test_another_sitecustomize_still_runs(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.was_customized = True")
    code = (
        f"import os; os.environ['PYTHONPATH'] += {':' + str(tmp_path)!r}\n"
        "child = [sys.executable, '-c', 'import sys; print(sys.was_customized)']\n"
        "subprocess.run(child, check=True)"
    )
    done = guarded(code, "strict", tmp_path / "report.jsonl")
    assert done.stdout == "True\n", done.stderr


def test_off_does_nothing(tmp_path: Path) -> None:
    done = guarded("import os; print('SHARDLINE_NETWORK_GUARD' in os.environ)", "off", tmp_path)
    assert done.stdout == "False\n", done.stderr


CALL_AND_COUNT = (
    f"try:\n socket.create_connection({AWAY}, 1)\nexcept OSError: pass\nprint(count_events())"
)


@pytest.mark.parametrize("is_named", [True, False])
def test_ranks_of_torchrun_share_a_report(tmp_path: Path, is_named: bool) -> None:
    """They are children of one process, as torchrun's are, and none inherits from another."""
    report = tmp_path / "report.jsonl" if is_named else None
    told = {"TMPDIR": str(tmp_path), "TORCHELASTIC_RUN_ID": "none"}
    for rank in ("1", "0", "2"):
        done = guarded(CALL_AND_COUNT, "strict", report, RANK=rank, **told)
    assert "Counts(refused=3, seen=0)" in done.stdout, done.stderr
    (found,) = tmp_path.iterdir()
    lines = events(found)
    assert ["guard" in line for line in lines] == [True, False, False, False]
    assert [line["rank"] for line in lines if "refused" in line] == ["1", "0", "2"]


def test_another_job_in_the_same_report_is_not_counted(tmp_path: Path) -> None:
    report = tmp_path / "report.jsonl"
    for _ in range(2):
        done = guarded(CALL_AND_COUNT, "strict", report)
        assert "Counts(refused=1, seen=0)" in done.stdout, done.stderr
    assert ["guard" in line for line in events(report)] == [True, False] * 2


def test_another_python_is_guarded_whatever_path_was_inherited(tmp_path: Path) -> None:
    child = f"import socket; socket.create_connection({AWAY}, 1)"
    other: Any = sys
    code = (
        f"child = [{other._base_executable!r}, '-c', {child!r}]\n"
        f"done = subprocess.run(child, cwd={str(tmp_path)!r}, capture_output=True, text=True)\n"
        "print(done.stderr.splitlines()[-1])"
    )
    report = tmp_path / "report.jsonl"
    done = guarded(code, "strict", report, PYTHONPATH=str(tmp_path))
    assert "NetworkRefusedError: the network guard refused" in done.stdout, done.stderr
