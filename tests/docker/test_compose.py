"""compose.yaml as `docker-compose` reads it, and a server that it starts and stops."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import httpx
import pytest
from containers import docker
from processes import ROOT

FILE = ROOT / "docker" / "compose.yaml"
COMPOSE = ["docker-compose"] if shutil.which("docker-compose") else ["docker", "compose"]


def compose(*arguments: str, check: bool = True, **settings: str) -> str:
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
    told = compose("config", COMPOSE_PROFILES="gpu", SHARDLINE_GPU_0="GPU-12ab")
    assert "GPU-12ab" in told
    assert "driver: nvidia" in told
    assert re.search(r"stop_grace_period: (1m30s|90s)", told)
    assert "memlock: -1" in told
    assert "read_only: true" in told
    assert "network_mode: none" in told


def test_over_http_a_key_has_to_be_named() -> None:
    files = ["--file", str(FILE.with_name("compose.http.yaml"))]
    command = [*COMPOSE, "--file", str(FILE), *files, "config"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "name the file that holds the key" in done.stderr
    with_key = {**os.environ, "SHARDLINE_API_KEY_FILE": "/etc/key", "COMPOSE_PROFILES": "cpu"}
    told = subprocess.run(command, env=with_key, capture_output=True, text=True, check=True).stdout
    assert "server.host=0.0.0.0" in told
    assert "network_mode: bridge" in told
    assert "server.api_key_file=/run/secrets/api-key" in told


def test_up_and_down(runtime: str, bundle: Path, sockets: Path) -> None:
    settings = {
        "COMPOSE_PROFILES": "cpu",
        "SHARDLINE_IMAGE": runtime,
        "SHARDLINE_BUNDLE": str(bundle),
        "SHARDLINE_SOCKETS": str(sockets),
    }
    sockets.chmod(0o777)
    try:
        compose("up", "--detach", **settings)
        name = compose("ps", "--quiet", **settings).strip()
        transport = httpx.HTTPTransport(uds=str(sockets / "shardline.sock"), retries=0)
        with httpx.Client(transport=transport, base_url="http://server", timeout=60) as client:
            for _ in range(600):
                try:
                    if client.get("/health/ready").status_code == 200:
                        break
                except httpx.TransportError:
                    state = json.loads(
                        docker("inspect", "--format", "{{json .State}}", name).stdout
                    )
                    assert state["Running"], docker("logs", name).stderr
                subprocess.run(["sleep", "0.5"], check=True)
            body = {"prompt": "abc", "max_tokens": 3}
            assert client.post("/v1/completions", json=body).status_code == 200
        compose("stop", **settings)
        assert docker("inspect", "--format", "{{.State.ExitCode}}", name).stdout == "0\n"
    finally:
        compose("down", "--volumes", check=False, **settings)
