"""A server in a container that has no network: reached through a socket in a mounted folder."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from containers import CONTRACT, Images, Served, docker, run_image, without

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


def test_a_bundle_of_the_builder_serves_and_survives_a_kill(
    images: Images, bundle: Path, sockets: Path
) -> None:
    """The runtime has no compiler, so whatever it serves was not built by it."""
    mounts = [f"{bundle}:/bundle:ro"]
    serve = ("--bundle", "/bundle", "--network-guard", "strict")
    with Served.start(images.runtime, sockets, *serve, mounts=mounts) as served:
        before = served.complete("abc", 8)
        assert before["usage"]["completion_tokens"] == 8
        assert "compiled (" in served.logs()
        docker("kill", "--signal", "KILL", served.name)
        assert served.exit_code() == 137
        docker("start", served.name)
        served.wait_until_ready()
        after = served.complete("abc", 8)
        assert after["choices"] == before["choices"]
        # The hook that refuses connections is in place; nothing here asks for one.
        with served.client() as client:
            metrics = client.get("/metrics").text
        assert 'shardline_network_guard_connections_total{outcome="refused"} 0.0' in metrics


def test_stop_under_load_lets_streams_finish(
    runtime: str, models: list[str], sockets: Path
) -> None:
    with Served.start(runtime, sockets, *CUT, mounts=models) as served:
        begun = [threading.Event() for _ in range(6)]
        with ThreadPoolExecutor(6) as pool:
            reading = [pool.submit(stream, served, f"{n}", 150, e) for n, e in enumerate(begun)]
            assert all(event.wait(180) for event in begun)
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
        served.wait_until_ready()
        served.wait_for_health("healthy")
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
        # One of them ends; the other does not notice.
        docker("stop", first.name, timeout_s=90)
        assert second.complete("abc", 20)["choices"] == answers[0]["choices"]
        # More memory than it may have: the kernel ends the job, not its neighbour.
        greedy = "import sys; sys.argv; x = b'x' * (4 << 30)"
        done = docker("exec", second.name, "python", "-c", greedy, check=False)
        assert done.returncode != 0
        assert second.state["Running"]


def test_a_bridge_is_served_with_a_key_alone(
    runtime: str, models: list[str], tmp_path: Path
) -> None:
    """As compose.http.yaml asks: every address of the container, and the key for each route."""
    key = tmp_path / "key"
    key.write_text("secret\n")
    key.chmod(0o644)
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    name = "shardline-test-bridge"
    options = [*without("--network"), "--detach", "--rm", "--name", name]
    options += ["--volume", f"{key}:/run/secrets/api-key:ro", "--publish", "127.0.0.1::8000"]
    done = run_image(
        *(runtime, "serve", *CUT, "--network-guard", "strict", "--set", "server.host=0.0.0.0"),
        *("--set", "server.api_key_file=/run/secrets/api-key"),
        mounts=models,
        options=options,
    )
    assert done.returncode == 0, done.stderr
    try:
        url = f"http://{docker('port', name, '8000').stdout.strip()}"
        deadline = time.monotonic() + 300
        while True:
            try:
                if httpx.get(f"{url}/health/ready").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            assert time.monotonic() < deadline, docker("logs", name).stderr
            time.sleep(0.5)
        body = {"prompt": "a", "max_tokens": 2}
        assert httpx.post(f"{url}/v1/completions", json=body).status_code == 401
        headers = {"Authorization": "Bearer secret"}
        assert httpx.post(f"{url}/v1/completions", json=body, headers=headers).status_code == 200
    finally:
        docker("rm", "--force", "--volumes", name, check=False)
