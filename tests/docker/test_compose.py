"""compose.yaml as `docker-compose` reads it, and a server that it starts and stops."""

import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import httpx
import pytest
from containers import docker
from processes import ROOT

FILE = ROOT / "docker" / "compose.yaml"
OVER_HTTP = ("--file", str(FILE.with_name("compose.http.yaml")))
COMPOSE = ["docker-compose"] if shutil.which("docker-compose") else ["docker", "compose"]


def compose(*arguments: str, check: bool = True, **settings: str) -> str:
    """What compose says.

    Args:
        arguments: may begin with OVER_HTTP.
    """
    done = subprocess.run(
        [*COMPOSE, "--project-name", "shardline-test", "--file", str(FILE), *arguments],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert not check or done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(autouse=True, scope="module")
def _needs_compose() -> None:
    if subprocess.run([*COMPOSE, "version"], capture_output=True, check=False).returncode:
        pytest.skip("neither docker-compose nor docker compose is installed")


def test_gpus_are_reserved_and_the_grace_is_more_than_a_drain_takes() -> None:
    told = compose("config", COMPOSE_PROFILES="gpu", CUDA_VISIBLE_DEVICES="GPU-12ab,GPU-34cd")
    assert re.search(r"CUDA_VISIBLE_DEVICES: GPU-12ab,GPU-34cd", told)
    assert "driver: nvidia" in told
    assert re.search("count: (all|-1)", told)
    assert re.search(r"stop_grace_period: (1m30s|90s)", told)
    assert "memlock: -1" in told
    assert "read_only: true" in told
    assert "network_mode: none" in told


def test_over_http_a_key_has_to_be_named() -> None:
    command = [*COMPOSE, "--file", str(FILE), *OVER_HTTP, "config"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "name the file that holds the key" in done.stderr


def test_over_http_those_with_the_key_are_served(
    runtime: str, bundle: Path, tmp_path: Path
) -> None:
    """At a port of this host, on a network, from every address of the container."""
    key = tmp_path / "key"
    key.write_text("secret\n")
    key.chmod(0o640)  # of root's group, which is the container's
    settings = {
        "COMPOSE_PROFILES": "cpu",
        "SHARDLINE_IMAGE": runtime,
        "SHARDLINE_BUNDLE": str(bundle),
        "SHARDLINE_API_KEY_FILE": str(key),
        "SHARDLINE_PORT": "0",
    }
    try:
        compose(*OVER_HTTP, "up", "--detach", **settings)
        name = compose(*OVER_HTTP, "ps", "--quiet", **settings).strip()
        url = f"http://{docker('port', name, '8000').stdout.strip()}"
        with httpx.Client(base_url=url, timeout=60) as client:
            wait_until_ready(client, name)
            body = {"prompt": "a", "max_tokens": 2}
            headers = {"Authorization": "Bearer secret"}
            assert client.post("/v1/completions", json=body).status_code == 401
            answer = client.post("/v1/completions", json=body, headers=headers)
            assert answer.status_code == 200
    finally:
        compose(*OVER_HTTP, "down", "--volumes", check=False, **settings)


def wait_until_ready(client: httpx.Client, name: str) -> None:
    for _ in range(600):
        try:
            if client.get("/health/ready").status_code == 200:
                return
        except httpx.TransportError:
            state = json.loads(docker("inspect", "--format", "{{json .State}}", name).stdout)
            assert state["Running"], docker("logs", name).stderr
        time.sleep(0.5)
    raise TimeoutError(docker("logs", name).stderr)


def test_up_and_down(runtime: str, bundle: Path, sockets: Path) -> None:
    settings = {
        "COMPOSE_PROFILES": "cpu",
        "SHARDLINE_IMAGE": runtime,
        "SHARDLINE_BUNDLE": str(bundle),
        "SHARDLINE_SOCKETS": str(sockets),
    }
    sockets.chmod(0o770)  # as the file says: root's group may write, and no other user
    try:
        compose("up", "--detach", **settings)
        name = compose("ps", "--quiet", **settings).strip()
        transport = httpx.HTTPTransport(uds=str(sockets / "shardline.sock"), retries=0)
        with httpx.Client(transport=transport, base_url="http://server", timeout=60) as client:
            wait_until_ready(client, name)
            body = {"prompt": "abc", "max_tokens": 3}
            assert client.post("/v1/completions", json=body).status_code == 200
        compose("stop", **settings)
        assert docker("inspect", "--format", "{{.State.ExitCode}}", name).stdout == "0\n"
    finally:
        compose("down", "--volumes", check=False, **settings)
