"""A server in a container that has no network: reached through a socket in a mounted folder."""

import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from containers import CONTRACT, Served, compile_in, docker

from runner.bundle.manifest import Manifest

CUT = ("--model", "/models/tiny", "-pp", "2", "--device", "cpu")


@pytest.fixture(scope="session")
def models(tiny: Path) -> list[str]:
    return [f"{tiny.parent}:/models:ro"]


def stream(served: Served, prompt: str, max_tokens: int, begun: threading.Event) -> list[str]:
    """The lines of a stream, read to its end."""
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "stream": True}
    lines = []
    with served.client() as client, client.stream("POST", "/v1/completions", json=body) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: "):
                lines.append(line)
                begun.set()
    return lines


def compilations(served: Served) -> list[float]:
    """How often each rank has compiled anything."""
    with served.client() as client:
        text = client.get("/metrics").text
    counts = re.findall(r"^shardline_rank_compilations_total\{.*\} (\S+)$", text, re.MULTILINE)
    assert counts, text
    return [float(count) for count in counts]


def test_a_bundle_serves_again_after_a_kill_and_compiles_nothing(
    runtime: str, bundle: Path, sockets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mounts = [f"{bundle}:/bundle:ro"]
    serve = ("--bundle", "/bundle", "--network-guard", "strict")
    begun = time.monotonic()
    with Served.start(runtime, sockets, *serve, mounts=mounts) as served:
        with capsys.disabled():
            print(f"\nfrom docker run to ready: {time.monotonic() - begun:.1f} s", end="")
        before = served.complete("abc", 8)
        assert before["usage"]["completion_tokens"] == 8
        assert compilations(served) == [0.0]
        docker("kill", "--signal", "KILL", served.name)
        assert served.exit_code() == 137
        docker("start", served.name)
        served.wait_until_ready()
        after = served.complete("abc", 8)
        assert after["choices"] == before["choices"]
        assert compilations(served) == [0.0]
        assert served.logs().count("compiled (eager)") == 2
        assert "compiling anew" not in served.logs()


@pytest.mark.full
def test_the_runtime_serves_what_the_builder_compiled(
    runtime: str, compiled: Path, sockets: Path
) -> None:
    """The runtime has no compiler, so whatever it serves was not built by it."""
    with Served.start(
        runtime, sockets, "--bundle", "/bundle", mounts=[f"{compiled}:/bundle:ro"]
    ) as served:
        assert "compiled (inductor)" in served.logs()
        before = served.complete("abc", 8)
        assert before["usage"]["completion_tokens"] == 8
        assert compilations(served) == [0.0]
        docker("kill", "--signal", "KILL", served.name)
        docker("start", served.name)
        served.wait_until_ready()
        assert served.complete("abc", 8)["choices"] == before["choices"]
        assert compilations(served) == [0.0]
        assert served.logs().count("compiled (inductor)") == 2


@pytest.mark.full
def test_auto_in_the_builder_measures_what_its_compiler_made(
    builder: str, tiny: Path, compiled: Path
) -> None:
    """Libraries that were made for the other bundle are taken over, and pass."""
    out = compiled.parent
    made = compile_in(builder, tiny, out, "auto", "--reuse-from", f"/out/{compiled.name}")
    choices = Manifest.read(made).choices
    assert choices
    for choice in choices:
        inductor = next(c for c in choice.candidates if c.backend == "inductor")
        assert inductor.parity, (choice.kind, inductor.note)
        assert inductor.microseconds


def test_stop_under_load_lets_streams_finish(
    runtime: str, models: list[str], sockets: Path
) -> None:
    with Served.start(runtime, sockets, *CUT, mounts=models) as served:
        begun = [threading.Event() for _ in range(6)]
        with ThreadPoolExecutor(6) as pool:
            reading = [pool.submit(stream, served, f"{n}", 600, e) for n, e in enumerate(begun)]
            assert all(event.wait(180) for event in begun)
            assert not any(future.done() for future in reading)
            started = time.monotonic()
            docker("stop", "--time", "60", served.name, timeout_s=90)
            took_s = time.monotonic() - started
            streams = [future.result(timeout=5) for future in reading]
        assert served.state["ExitCode"] == 0, served.logs()
        assert took_s < 60
        assert all(lines[-1] == "data: [DONE]" for lines in streams)
        assert all('"finish_reason": "length"' in lines[-2] for lines in streams)
    assert not served.socket.exists()


def test_health_follows_the_ranks(runtime: str, models: list[str], sockets: Path) -> None:
    given = [*CUT, "--set", "server.stall_timeout_s=3"]
    with Served.start(runtime, sockets, *given, mounts=models, wait=False) as served:
        assert served.health == "starting"
        health, is_ready = "starting", False
        while not (health == "healthy" and is_ready):
            # In this order, so that what was healthy has to be ready afterwards.
            health, is_ready = served.health, served.is_ready()
            assert health in ("starting", "healthy"), served.logs()
            assert is_ready or health == "starting"
        find = (
            "import os\n"
            "for pid in filter(str.isdigit, os.listdir('/proc')):\n"
            "    if b'\\0RANK=1\\0' in open(f'/proc/{pid}/environ', 'rb').read(): print(pid)"
        )
        rank = docker("exec", served.name, "python", "-c", find).stdout.split()[0]
        docker("exec", served.name, "sh", "-c", f"kill -STOP {rank}")
        served.wait_for_health("unhealthy", timeout_s=180)
        last = docker("inspect", "--format", "{{json .State.Health.Log}}", served.name).stdout
        assert "stalled" in last
        docker("exec", served.name, "sh", "-c", f"kill -CONT {rank}")
        served.wait_for_health("healthy", timeout_s=180)


@pytest.mark.full
def test_two_jobs_on_one_host_stay_apart(runtime: str, models: list[str], sockets: Path) -> None:
    """Separate sockets and caches, cores of their own, and a hard limit of memory each."""
    mine, theirs = sockets / "a", sockets / "b"
    cores = [["--cpuset-cpus", core, "--memory", "3g"] for core in ("0", "1")]
    one = Served.start(
        runtime, mine, *CUT, mounts=models, options=[*CONTRACT, *cores[0]], wait=False
    )
    other = Served.start(
        runtime, theirs, *CUT, mounts=models, options=[*CONTRACT, *cores[1]], wait=False
    )
    with one as first, other as second:
        for served in (first, second):
            served.wait_until_ready()
        with ThreadPoolExecutor(2) as pool:
            asked = [pool.submit(s.complete, "abc", 20) for s in (first, second) for _ in range(3)]
            answers: list[Any] = [future.result() for future in asked]
        assert len({str(answer["choices"]) for answer in answers}) == 1
        seen = "import os; print(os.sched_getaffinity(0), os.listdir('/sockets'))"
        assert docker("exec", first.name, "python", "-c", seen).stdout.startswith("{0}")
        assert docker("exec", second.name, "python", "-c", seen).stdout.startswith("{1}")
        docker("exec", first.name, "sh", "-c", "echo mine > /cache/mark")
        assert docker("exec", second.name, "cat", "/cache/mark", check=False).returncode == 1
        # Who takes more memory than his container may have is ended by the kernel; next door nobody
        # notices.
        greedy = "x = bytearray(4 << 30); x[::4096] = bytes([1]) * len(x[::4096])"
        done = docker("exec", second.name, "python", "-c", greedy, check=False)
        assert done.returncode == 137, done.stderr
        assert first.complete("abc", 20)["choices"] == answers[0]["choices"]
        # One of them ends; the other does not notice.
        docker("stop", first.name, timeout_s=90)
        assert second.state["Running"]
        assert second.complete("abc", 20)["choices"] == answers[0]["choices"]
