"""Ranks that die, stall or are interrupted in mid-generation: the job ends at once and says why."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import endless
import pytest
from endless import make_endless
from processes import processes_naming, rank_pid, run_command, wait_until_gone

pytestmark = pytest.mark.dist

EXIT_WITHIN_S = 5.0
TORCHRUN = [
    *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
    *("--nproc-per-node", "2", "-m", "runner"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model that can generate for minutes."""
    return make_endless(tmp_path_factory.mktemp("endless"))


@pytest.fixture(autouse=True)
def _leave_nothing(model: Path) -> Iterator[None]:
    """A test that fails must not spoil the next one."""
    yield
    for pid in processes_naming(str(model)):
        os.kill(pid, signal.SIGKILL)


def generating(model: Path, *arguments: str) -> subprocess.Popen[str]:
    """A job of two ranks whose first text is out."""
    return endless.generating(model, "--device", "cpu", "-tp", "2", *arguments)


def ends(
    job: subprocess.Popen[str], model: Path, *, within_s: float = EXIT_WITHIN_S
) -> tuple[int, str]:
    """See `endless.ends`."""
    return endless.ends(job, model, within_s=within_s)


def test_killed_rank_is_named(model: Path) -> None:
    job = generating(model)
    os.kill(rank_pid(str(model), 1), signal.SIGKILL)
    exit_code, line = ends(job, model)
    assert exit_code == 8
    assert line.startswith("shardline: rank 1 (stage 0, tp rank 1): killed by SIGKILL while ")


def test_stalled_rank_is_named(model: Path) -> None:
    timeout_s = 3
    job = generating(model, "--set", f"distributed.collective_timeout_s={timeout_s}")
    os.kill(rank_pid(str(model), 1), signal.SIGSTOP)
    exit_code, line = ends(job, model, within_s=timeout_s + EXIT_WITHIN_S)
    assert exit_code == 9
    assert line.startswith("shardline: rank 0 (stage 0, tp rank 0):")
    assert "no sign of life from rank 1 (stage 0, tp rank 1) while " in line


@pytest.mark.parametrize(("signum", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_ends_all_ranks(model: Path, signum: signal.Signals, exit_code: int) -> None:
    job = generating(model)
    job.send_signal(signum)
    assert ends(job, model)[0] == exit_code


def test_single_rank_obeys_interrupt(model: Path) -> None:
    job = generating(model, "-tp", "1")
    job.send_signal(signal.SIGINT)
    assert ends(job, model)[0] == 130


@pytest.mark.full
def test_closed_output_ends_all_ranks(model: Path) -> None:
    job = generating(model)
    assert job.stdout is not None
    job.stdout.close()
    assert job.stderr is not None
    assert "standard output was closed" in job.stderr.readlines()[-1]
    assert job.wait(EXIT_WITHIN_S) == 141
    assert wait_until_gone(str(model), timeout_s=EXIT_WITHIN_S) == []


def test_ranks_die_with_their_launcher(model: Path) -> None:
    job = generating(model)
    assert len(processes_naming(str(model))) == 3
    job.kill()
    job.communicate()
    assert wait_until_gone(str(model), timeout_s=EXIT_WITHIN_S) == []


@pytest.mark.full
def test_torchrun_joins_and_agrees(model: Path) -> None:
    arguments = [
        *("generate", "--prompt", "Hello", "--device", "cpu", "--json"),
        *("-tp", "2", "--model", str(model), "--max-tokens", "12"),
    ]
    own = run_command(*arguments)
    assert own.returncode == 0, own.stderr
    joined = run_command(*arguments, launcher=TORCHRUN)
    assert joined.returncode == 0, joined.stderr
    assert joined.stdout == own.stdout


def test_torchrun_with_another_world_size_is_refused(model: Path) -> None:
    arguments = ["generate", "--prompt", "Hello", "--device", "cpu", "--model", str(model)]
    done = run_command(*arguments, "-tp", "3", launcher=TORCHRUN)
    assert done.returncode != 0
    line = "world size 2: the plan has 3 ranks (tensor-parallel sizes [3]); start 3 processes"
    # torchrun ends the other rank as soon as one has spoken.
    assert any(f"shardline: rank {rank}: {line}" in done.stderr for rank in (0, 1))
    assert processes_naming(str(model)) == []
