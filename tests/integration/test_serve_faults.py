"""A server under load whose ranks die or stall, and one that is told to end."""

import os
import signal
import socket
import time
from pathlib import Path

import httpx
import pytest
from checkpoints import add_tokenizer, make_checkpoint
from hang import Spoil, may_hang
from processes import processes_naming, rank_pid, start_command, wait_until_gone
from servers import Server
from streams import FULL, Stream, silent_stream, streaming

pytestmark = [pytest.mark.dist, pytest.mark.timeout(300)]

CUT = ["-tp", "2", "-pp", "2"]
NAMES = [f"rank {2 * stage + r} (stage {stage}, tp rank {r})" for stage in (0, 1) for r in (0, 1)]
LONG = 8000
"""Tokens of an answer that takes minutes."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faulty") / "tiny"
    folder.mkdir()
    changes = {"vocab_size": 259, "max_position_embeddings": 10_000, "eos_token_id": None}
    plain = {"rope_type": "default", "rope_theta": 10000.0}
    make_checkpoint("llama", folder, rope_parameters=plain, **changes)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    return add_tokenizer(folder)


def port_is_free(server: Server) -> bool:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_server((host, int(port))):
        return True


def after_fault(
    server: Server, model: Path, rank: int, signum: signal.Signals, *, within_s: float
) -> tuple[int, list[Stream]]:
    """The exit code of a server whose rank gets a signal while 16 streams run, and the streams."""
    with streaming(server, 16, max_tokens=LONG) as reading:
        started = time.monotonic()
        os.kill(rank_pid(str(model), rank), signum)
        exit_code = server.process.wait(within_s)
        streams = [stream.result(timeout=5) for stream in reading]
    left_s = max(1.0, started + within_s - time.monotonic())
    assert wait_until_gone(str(model), timeout_s=left_s) == []
    assert port_is_free(server)
    return exit_code, streams


@pytest.mark.parametrize(
    "rank", [pytest.param(rank, marks=[] if rank == 3 else [pytest.mark.full]) for rank in range(4)]
)
def test_a_rank_that_is_killed_ends_every_stream_with_an_error(model: Path, rank: int) -> None:
    with Server.start(model, *CUT) as server:
        exit_code, streams = after_fault(server, model, rank, signal.SIGKILL, within_s=10)
        said = "".join(server.said)
    assert exit_code == 8, said
    assert f"shardline: {NAMES[rank]}: killed by SIGKILL" in said
    if rank == 0:  # It held the connections.
        assert all(stream.broken for stream in streams)
    else:
        assert all("the engine has ended" in (stream.error or "") for stream in streams)


@pytest.mark.full
@pytest.mark.parametrize("rank", range(4))
def test_a_rank_that_stalls_is_named(model: Path, rank: int) -> None:
    limit_s = 4
    limit = ["--set", f"distributed.collective_timeout_s={limit_s}"]
    with Server.start(model, *CUT, *limit) as server:
        exit_code, streams = after_fault(server, model, rank, signal.SIGSTOP, within_s=limit_s + 10)
        said = "".join(server.said)
    assert exit_code == 9, said
    others = [name for name in NAMES if name != NAMES[rank]]
    _, _, silent = said.partition("no sign of life from ")
    assert silent.startswith(f"{NAMES[rank]} while ")
    assert not any(name in silent for name in others)
    assert "most recent call first" in said, "it shows its stack, stopped as it was"
    if rank == 0:  # It goes on to show its stack, and may come to tell them.
        assert all(stream.broken or stream.error for stream in streams)
    else:
        assert all("the engine has ended" in (stream.error or "") for stream in streams)


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.full)])
def test_an_idle_server_lives_on_and_notices_a_rank_that_stalls(model: Path, rank: int) -> None:
    limit = ["--set", "distributed.collective_timeout_s=3"]
    with Server.start(model, "-pp", "2", *limit) as server:
        time.sleep(5)
        assert httpx.get(f"{server.url}/health/ready", timeout=60).status_code == 200
        asked = {"prompt": "x", "max_tokens": 1}
        assert httpx.post(f"{server.url}/v1/completions", json=asked, timeout=60).status_code == 200
        os.kill(rank_pid(str(model), rank), signal.SIGSTOP)
        assert server.process.wait(15) == 9
        assert f"no sign of life from rank {rank} (stage {rank}" in "".join(server.said)
    assert wait_until_gone(str(model), timeout_s=5) == []


@pytest.fixture
def hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Spoil:
    return may_hang(tmp_path, monkeypatch)


def test_a_loop_that_hangs_is_no_life_whatever_its_other_threads_do(
    model: Path, hang: Spoil
) -> None:
    """One rank: nobody else waits for it, and its server answers all the while."""
    limit = ["--set", "distributed.collective_timeout_s=3"]
    with Server.start(model, *limit) as server:
        with streaming(server, 4, max_tokens=LONG) as reading:
            assert httpx.get(f"{server.url}/health/live").status_code == 200
            hang(0)
            deadline = time.monotonic() + 10
            while (live := httpx.get(f"{server.url}/health/live")).status_code == 200:
                assert time.monotonic() < deadline
                time.sleep(0.1)
            assert live.status_code == 503
            assert live.json()["status"] == "stalled"
            (told,) = live.json()["stalled"]
            assert "rank 0 (stage 0, tp rank 0): no progress for 3 s while" in told
            assert httpx.get(f"{server.url}/health/ready").status_code == 503
            streams = [stream.result(timeout=10) for stream in reading]
        assert all("the engine has stalled: rank 0" in (s.error or "") for s in streams)
        assert server.process.wait(5) == 9
        said = "".join(server.said)
    assert "in hang_here" in said
    assert "shardline: rank 0 (stage 0, tp rank 0): no progress for" in said


@pytest.mark.full
@pytest.mark.parametrize("rank", range(2))
def test_of_several_ranks_the_one_whose_loop_hangs_is_named(
    model: Path, hang: Spoil, rank: int
) -> None:
    limit = ["--set", "distributed.collective_timeout_s=3"]
    with Server.start(model, "-pp", "2", *limit) as server:
        with streaming(server, 4, max_tokens=LONG) as reading:
            hang(rank)
            streams = [stream.result(timeout=20) for stream in reading]
        assert all(stream.error for stream in streams)
        assert server.process.wait(10) == 9
        said = "".join(server.said)
    assert "in hang_here" in said
    name = f"rank {rank} (stage {rank}, tp rank 0)"
    assert f"{name} while computing its stage" in said or f"{name}: no progress for" in said
    assert wait_until_gone(str(model), timeout_s=5) == []


def test_a_loop_that_hangs_with_its_clients_locked_ends_the_job(model: Path, hang: Spoil) -> None:
    """Nobody can be told then, but the job must not outlive it."""
    with Server.start(model, "--set", "distributed.collective_timeout_s=3") as server:
        with streaming(server, 4, max_tokens=LONG) as reading:
            hang(0, "hang in take")
            assert server.process.wait(15) == 9
            assert all(stream.result(timeout=5).broken for stream in reading)
        said = "".join(server.said)
    assert "in hang_here" in said
    assert "shardline: rank 0 (stage 0, tp rank 0): no progress for" in said


@pytest.mark.full
def test_a_rank_that_raises_is_named_with_its_stack(model: Path, hang: Spoil) -> None:
    with Server.start(model, *CUT) as server:
        with streaming(server, 4, max_tokens=LONG) as reading:
            hang(2, "raise")
            streams = [stream.result(timeout=20) for stream in reading]
        assert all("the engine has ended" in (stream.error or "") for stream in streams)
        assert server.process.wait(10) == 8
        said = "".join(server.said)
    assert "in raise_here" in said
    assert (
        f"shardline: {NAMES[2]}: ValueError while computing its stage: the step went wrong" in said
    )
    assert wait_until_gone(str(model), timeout_s=5) == []


@pytest.mark.parametrize(
    "signum",
    [
        pytest.param(signal.SIGTERM, id="SIGTERM"),
        pytest.param(signal.SIGINT, id="SIGINT", marks=pytest.mark.full),
    ],
)
def test_a_signal_under_load_lets_every_stream_end(model: Path, signum: signal.Signals) -> None:
    with Server.start(model, *CUT) as server:
        with streaming(server, 16, max_tokens=120) as reading:
            server.process.send_signal(signum)
            streams = [stream.result(timeout=60) for stream in reading]
        assert [stream.finish_reason for stream in streams] == ["length"] * 16
        assert server.process.wait(20) == 0, "".join(server.said)
    assert processes_naming(str(model)) == []


@pytest.mark.full
def test_one_who_reads_slowly_has_the_answer_after_sigterm(model: Path) -> None:
    with Server.start(model) as server:
        with silent_stream(server, FULL) as silent:
            server.terminate()
            time.sleep(5)
            assert server.process.poll() is None
            assert b"data: [DONE]" in silent.makefile("rb").read()
        assert server.process.wait(10) == 0, "".join(server.said)


@pytest.mark.parametrize(
    "cut",
    [pytest.param([], id="one rank"), pytest.param(CUT, id="four ranks", marks=pytest.mark.full)],
)
def test_a_server_told_to_end_while_it_starts_ends_at_once(model: Path, cut: list[str]) -> None:
    given = ["--model", str(model), "--device", "cpu", "--set", "server.port=0", *cut]
    process = start_command("serve", *given)
    try:
        assert process.stderr is not None
        # It listens, which is before anything is loaded.
        assert " at http://" in next(line for line in process.stderr if "serving" in line)
        process.terminate()
        assert process.wait(10) == 128 + signal.SIGTERM
        assert process.stderr.read() == ""
    finally:
        process.kill()
        process.wait()
    assert wait_until_gone(str(model), timeout_s=2) == []


@pytest.mark.full
def test_a_second_sigterm_leaves_no_process(model: Path) -> None:
    with Server.start(model, *CUT) as server, streaming(server, 16, max_tokens=LONG) as reading:
        server.terminate()
        time.sleep(0.5)
        server.terminate()
        assert server.process.wait(8) == 128 + signal.SIGTERM
        assert all(stream.result(timeout=5).finish_reason is None for stream in reading)
        assert wait_until_gone(str(model), timeout_s=2) == []
