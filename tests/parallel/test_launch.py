"""The launcher: ranks learn their place, the first failure is named, and nothing is left behind."""

import signal
import sys
import textwrap
import time
from pathlib import Path

import pytest

from parallel.errors import ConfigError, ShardlineError
from parallel.launch import adopt, run_ranks

PRELUDE = """
import os, sys, time
from parallel.launch import Failure, adopt, report
env = adopt()
"""


def launch(script: str, world_size: int) -> None:
    command = [sys.executable, "-c", PRELUDE + textwrap.dedent(script)]
    run_ranks(command, world_size, describe=lambda rank: f"rank {rank}")


def test_ranks_learn_their_place(tmp_path: Path) -> None:
    launch(f"open(f'{tmp_path}/{{env.rank}}-of-{{env.world_size}}', 'w').close()", 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0-of-3", "1-of-3", "2-of-3"]


def test_ranks_meet_at_the_store() -> None:
    launch(
        """
        from datetime import timedelta
        store = env.store(timedelta(seconds=60))
        store.set(f"from {env.rank}", str(env.rank))
        assert store.get(f"from {1 - env.rank}") == str(1 - env.rank).encode()
        store.add("done", 1)
        while env.rank == 0 and store.add("done", 0) < 2: time.sleep(0.01)
        """,
        2,
    )


def test_the_rank_that_failed_first_is_named_not_the_one_heard_first() -> None:
    """Rank 0 loses its peer and says so before rank 1's own report arrives."""
    with pytest.raises(ShardlineError, match=r"^rank 1: ValueError: the cause$") as caught:
        launch(
            """
            if env.rank == 0:
                report(env, Failure("lost a peer", 8, secondary=True))
                sys.exit(8)
            time.sleep(0.2)
            report(env, Failure("ValueError: the cause", 4))
            sys.exit(4)
            """,
            2,
        )
    assert caught.value.exit_code == 4


def test_a_rank_that_says_nothing_is_named_by_its_exit_code() -> None:
    with pytest.raises(ShardlineError, match=r"^rank 1: ended with exit code 3$") as caught:
        launch("sys.exit(3) if env.rank == 1 else time.sleep(60)", 2)
    assert caught.value.exit_code == 8


def test_where_all_that_speak_waited_in_vain_the_silent_are_named() -> None:
    """As after gloo's timeout, or when NCCL's watchdog aborts the ranks that are well."""
    with pytest.raises(
        ShardlineError, match=r"^rank 0: .*; no sign of life from rank 1$"
    ) as caught:
        launch("os.abort() if env.rank == 0 else time.sleep(60)", 2)
    assert caught.value.exit_code == 9


def test_ranks_get_the_environment_that_is_given(tmp_path: Path) -> None:
    script = f"open(os.path.join({str(tmp_path)!r}, os.environ['GIVEN']), 'w').close()"
    command = [sys.executable, "-c", PRELUDE + script]
    run_ranks(command, 1, describe=str, environment={"GIVEN": "here"})
    assert (tmp_path / "here").exists()


def test_ranks_talk_over_loopback_unless_the_user_says_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a container with `--network none` needs of NCCL and gloo."""
    names = ["NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "MASTER_ADDR"]
    said = f"open({str(tmp_path / 'said')!r}, 'w').write"
    script = f"{said}(' '.join(os.environ[name] for name in {names}))"
    command = [sys.executable, "-c", PRELUDE + script]
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    run_ranks(command, 1, describe=str)
    assert (tmp_path / "said").read_text() == "lo lo 127.0.0.1"
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth1")
    run_ranks(command, 1, describe=str)
    assert (tmp_path / "said").read_text() == "eth1 lo 127.0.0.1"


def test_a_rank_that_ignores_sigterm_is_killed() -> None:
    started = time.monotonic()
    with pytest.raises(ShardlineError, match="rank 1"):
        launch(
            """
            import signal
            if env.rank == 1: time.sleep(0.5); sys.exit(1)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(60)
            """,
            2,
        )
    assert time.monotonic() - started < 30


def test_a_process_that_nobody_launched_is_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert adopt() is None


def test_nonsense_in_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "first")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="RANK='first'"):
        adopt()


def test_signal_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    launch("pass", 1)
    assert signal.getsignal(signal.SIGINT) is before
