"""Nothing reaches out: Python's sockets are refused by the guard, native ones by the namespace."""

import json
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from containers import CONTRACT, Served, docker, readable, run_image, without, writable

FACTORY = """
import ctypes, os, socket, struct, sys
import torch

def model(host, port, how):
    if how == "quietly":
        try:
            socket.create_connection((host, port), timeout=5)
        except PermissionError:
            pass
    if how == "python":
        with socket.create_connection((host, port), timeout=5) as connection:
            connection.sendall(b"hello")
    if how == "ctypes":
        libc = ctypes.CDLL(None, use_errno=True)
        family = struct.pack("=H", socket.AF_INET)
        address = struct.pack("!2sH4s8x", family, port, socket.inet_aton(host))
        if libc.connect(libc.socket(socket.AF_INET, socket.SOCK_STREAM, 0), address, 16) != 0:
            raise OSError(ctypes.get_errno(), "ctypes: " + os.strerror(ctypes.get_errno()))
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
"""


@dataclass(frozen=True)
class Target:
    """A listener that containers on a network of their own can reach.

    Attributes:
        network: its name.
    """

    network: str
    host: str
    listener: socket.socket

    @property
    def port(self) -> int:
        return int(self.listener.getsockname()[1])

    def was_reached(self) -> bool:
        """Whether anybody has connected since this was last asked."""
        try:
            self.listener.accept()[0].close()
        except TimeoutError:
            return False
        return True


@pytest.fixture(scope="module")
def target() -> Iterator[Target]:
    name = f"shardline-test-{uuid.uuid4().hex[:8]}"
    docker("network", "create", name)
    try:
        shown = docker("network", "inspect", "--format", "{{(index .IPAM.Config 0).Gateway}}", name)
        host = shown.stdout.strip()
        with socket.create_server((host, 0)) as listener:
            listener.settimeout(0.5)
            yield Target(name, host, listener)
    finally:
        docker("network", "rm", name)


@contextmanager
def job(folder: Path, target: Target, how: str) -> Iterator[list[str]]:
    """What is mounted: a plan whose factory connects to the target, an input, a place to write."""
    plan = {
        "version": 1,
        "model": {
            "path": "/job",
            "factory": "calls_home:model",
            "factory_path": "/job",
            "factory_args": {"host": target.host, "port": target.port, "how": how},
            "load_format": "dummy",
            "inputs": [{"name": "x", "shape": ["batch", 4]}],
        },
        "security": {"factories": ["calls_home:model"]},
        "scheduler": {"max_batch_size": 1},
    }
    (folder / "job").mkdir()
    (folder / "out").mkdir()
    (folder / "job" / "plan.yaml").write_text(json.dumps(plan))
    (folder / "job" / "calls_home.py").write_text(FACTORY)
    np.save(folder / "job" / "x.npy", np.ones(4, np.float32))
    readable(folder)
    writable(folder / "out")
    yield [f"{folder}/job:/job:ro", f"{folder}/out:/out"]


RUN = (
    *("run", "--config", "/job/plan.yaml", "--device", "cpu", "/job/x.npy", "--output", "/out/y"),
    *("--set", "security.network_report=/out/report.jsonl"),
)


def report_of(folder: Path) -> list[dict[str, object]]:
    lines = (folder / "out" / "report.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_factory_that_connects_is_refused_and_named(
    runtime: str, target: Target, tmp_path: Path
) -> None:
    options = [*without("--network"), "--network", target.network]
    with job(tmp_path, target, "python") as mounts:
        done = run_image(runtime, *RUN, "--network-guard", "strict", mounts=mounts, options=options)
    assert done.returncode == 2, done.stdout + done.stderr
    whom = f"refused a connection to {target.host} port {target.port}"
    assert whom in done.stderr.splitlines()[-1]
    assert "calls_home:model raised NetworkRefusedError" in done.stderr.splitlines()[-1]
    assert not target.was_reached()
    head, event = report_of(tmp_path)[:2]
    assert head["guard"] == "strict"
    assert str(head["fence"]).startswith("none: this network has eth0")
    assert event["to"] == f"{target.host} port {target.port}"
    assert any("/job/calls_home.py" in str(frame) for frame in event["stack"])  # type: ignore[attr-defined]


def test_every_rank_is_guarded_and_the_metric_counts_them(
    runtime: str, target: Target, tmp_path: Path, sockets: Path
) -> None:
    """A factory that keeps to itself that it was refused: in the launcher and in both ranks."""
    options = [*without("--network"), "--network", target.network]
    serve = (
        "--config",
        "/job/plan.yaml",
        "--device",
        "cpu",
        "-pp",
        "2",
        "--network-guard",
        "strict",
    )
    report = ("--set", "security.network_report=/out/report.jsonl")
    with (
        job(tmp_path, target, "quietly") as mounts,
        Served.start(runtime, sockets, *serve, *report, mounts=mounts, options=options) as served,
        served.client() as client,
    ):
        metrics = client.get("/metrics").text
    assert not target.was_reached()
    refused = [event for event in report_of(tmp_path) if event.get("refused")]
    assert {"0", "1"} <= {event["rank"] for event in refused}
    name = 'shardline_network_guard_connections_total{outcome="refused"}'
    assert f"{name} {len(refused):.1f}" in metrics


def test_the_network_of_that_test_is_live(runtime: str, target: Target, tmp_path: Path) -> None:
    """Without the guard the same job gets through, so it was the guard that refused."""
    options = [*without("--network"), "--network", target.network]
    with job(tmp_path, target, "python") as mounts:
        done = run_image(runtime, *RUN, "--network-guard", "warn", mounts=mounts, options=options)
    assert done.returncode == 0, done.stderr
    assert f"saw a connection to {target.host} port {target.port}" in done.stderr
    assert target.was_reached()
    assert not any(event.get("refused") for event in report_of(tmp_path))


def test_native_code_is_fenced_by_the_empty_namespace(
    runtime: str, target: Target, tmp_path: Path
) -> None:
    with job(tmp_path, target, "ctypes") as mounts:
        done = run_image(
            runtime, *RUN, "--network-guard", "strict", mounts=mounts, options=CONTRACT
        )
    assert done.returncode == 2, done.stderr
    assert "ctypes: Network is unreachable" in done.stderr
    assert not target.was_reached()
    assert report_of(tmp_path)[0]["fence"] == "network namespace with loopback alone"


def test_native_code_reaches_out_where_there_is_no_fence(
    runtime: str, target: Target, tmp_path: Path
) -> None:
    """What the report's "none" means."""
    options = [*without("--network"), "--network", target.network]
    with job(tmp_path, target, "ctypes") as mounts:
        done = run_image(runtime, *RUN, "--network-guard", "strict", mounts=mounts, options=options)
    assert done.returncode == 0, done.stderr
    assert target.was_reached()
    assert str(report_of(tmp_path)[0]["fence"]).startswith("none")
