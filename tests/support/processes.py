"""Run the command as a user does, and see what processes it leaves."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

COMMAND = [sys.executable, "-m", "runner"]
ROOT = Path(__file__).parents[2]


def run_command(
    *arguments: str,
    launcher: Sequence[str] = COMMAND,
    cwd: Path = ROOT,
    timeout_s: float = 90,
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run to the end; the output is text.

    Args:
        environment: all of it; None: this process's own.
    """
    return subprocess.run(
        [*launcher, *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
        env=environment,
    )


def start_command(*arguments: str, launcher: Sequence[str] = COMMAND) -> subprocess.Popen[str]:
    """Start and go on; both outputs are text pipes."""
    return subprocess.Popen(
        [*launcher, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def processes_naming(text: str) -> list[int]:
    """Processes, other than this one, whose command line holds `text`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                command_line = (entry / "cmdline").read_bytes().decode(errors="replace")
            except (FileNotFoundError, ProcessLookupError):
                continue
            if text in command_line:
                found.append(int(entry.name))
    return found


def rank_pid(text: str, rank: int) -> int:
    """The process of a rank whose command line holds `text`."""
    for pid in processes_naming(text):
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        if f"RANK={rank}".encode() in environment:
            return pid
    raise ProcessLookupError(f"rank {rank} of {text}")


@contextmanager
def held_rank(text: str, rank: int) -> Iterator[None]:
    """A rank whose command line holds `text` comes no further until the body ends."""
    deadline = time.monotonic() + 60
    while True:
        try:
            pid = rank_pid(text, rank)
            break
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def wait_until_gone(text: str, *, timeout_s: float) -> list[int]:
    """Processes that are still there after at most `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while (left := processes_naming(text)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left
