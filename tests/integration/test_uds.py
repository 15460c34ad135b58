"""A server at a Unix socket, asked by `health` and by clients; and the guard, as a job says it."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
from checkpoints import add_tokenizer
from plan_file import factory_plan
from processes import run_command, start_command

pytestmark = [pytest.mark.dist, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def model(checkpoint: Callable[[str], Path]) -> Path:
    return add_tokenizer(checkpoint("llama"))


@contextmanager
def serving(model: Path, path: Path, *options: str) -> Iterator["subprocess.Popen[str]"]:
    process = start_command(
        "serve", "--model", str(model), "--device", "cpu", "--uds", str(path), *options
    )
    try:
        deadline = time.monotonic() + 150
        while run_command("health", "--url", f"unix:{path}").returncode != 0:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
        yield process
    finally:
        process.kill()
        process.wait()


def test_clients_come_by_the_socket_and_its_file_goes_with_the_server(
    model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "s"
    with serving(model, path, "-pp", "2") as process:
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path))) as client:
            body = {"prompt": "a", "max_tokens": 3}
            answer = client.post("http://x/v1/completions", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        again = run_command("serve", "--model", str(model), "--device", "cpu", "--uds", str(path))
        assert again.returncode == 2
        assert f"cannot listen at {path} (Address already in use)" in again.stderr
        assert path.is_socket(), "the first server still has it"
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert not path.exists()
    asked = run_command("health", "--url", f"unix:{path}")
    assert asked.returncode == 1
    assert f"not ready: no server answers at unix:{path} (No such file" in asked.stderr


@pytest.mark.full
def test_the_socket_of_a_server_that_was_killed_is_taken_over(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "s"
    with serving(model, path) as process:
        process.kill()
        process.wait()
        assert path.is_socket()
    with serving(model, path):
        pass


def test_a_path_that_cannot_be_listened_at(model: Path, tmp_path: Path) -> None:
    for path in (tmp_path / "absent" / "s", tmp_path / ("x" * 120)):
        done = run_command("serve", "--model", str(model), "--device", "cpu", "--uds", str(path))
        assert done.returncode == 2
        assert f"cannot listen at {path}" in done.stderr


def test_preflight_names_the_folder_of_the_socket(model: Path, tmp_path: Path) -> None:
    asked = ("--preflight", "serve", "--model", str(model), "--device", "cpu")
    done = run_command(*asked, "--uds", str(tmp_path / "absent" / "s"))
    assert done.returncode == 3, done.stderr
    assert f"preflight error, socket_dir: {tmp_path / 'absent'} does not exist" in done.stderr
    assert "install -d -m 0770 -g" in done.stderr


FACTORY = """
import socket, torch

def model():
    try:
        socket.create_connection(("192.0.2.1", 9), timeout=1)
    except OSError:
        pass  # as many libraries do
    return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
"""


def write_plan(folder: Path, factory: str, code: str, **security: str) -> str:
    """A plan of a tensor model that `code` makes, and an input; returns the plan's path."""
    module = factory.partition(":")[0]
    (folder / f"{module}.py").write_text(code)
    plan = factory_plan(folder, factory, {"name": "x", "shape": ["batch", 4]})
    plan["security"] |= security
    path = folder / "plan.yaml"
    path.write_text(json.dumps(plan))
    np.save(folder / "x.npy", np.ones(4, np.float32))
    return str(path)


def test_a_factory_that_hides_its_refusal_is_still_reported(tmp_path: Path) -> None:
    plan = write_plan(tmp_path, "calls_home:model", FACTORY, network_guard="strict")
    report = tmp_path / "report.jsonl"
    done = run_command(
        *("run", "--config", plan, "--device", "cpu"),
        *(str(tmp_path / "x.npy"), "--output", str(tmp_path / "out")),
        *("--set", f"security.network_report={report}"),
    )
    assert done.returncode == 0, done.stderr
    assert "the network guard refused a connection to 192.0.2.1 port 9" in done.stderr
    events = [json.loads(line) for line in report.read_text().splitlines()]
    assert events[0]["guard"] == "strict"
    assert any("calls_home.py" in frame for frame in events[1]["stack"])


@pytest.mark.full
def test_ranks_of_torchrun_report_to_one_file(tmp_path: Path) -> None:
    plan = write_plan(tmp_path, "calls_home:model", FACTORY, network_guard="strict")
    report = tmp_path / "report.jsonl"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = run_command(
        *("run", "--config", plan, "--device", "cpu", "-pp", "2"),
        *(str(tmp_path / "x.npy"), "--output", str(tmp_path / "out")),
        *("--set", f"security.network_report={report}"),
        launcher=[*torchrun, "--nproc-per-node", "2", "-m", "runner"],
        timeout_s=180,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in report.read_text().splitlines()]
    assert sum("guard" in line for line in lines) == 1
    assert {line["rank"] for line in lines if "refused" in line} == {"0", "1"}
    assert len({line["job"] for line in lines}) == 1


@pytest.mark.parametrize(
    ("listed", "said"),
    [
        ("0,x", "'x' is no GPU"),
        ("1,1", "is given twice"),
        ("", "'' is no GPU"),
        ("MIG-9f,MIG-12ab", "one MIG instance and nothing beside it"),
        ("0,MIG-9f", "one MIG instance and nothing beside it"),
    ],
)
def test_devices_that_are_none(model: Path, listed: str, said: str) -> None:
    given = ["--model", str(model), "--devices", listed, "--prompt", "a"]
    done = run_command("generate", *given)
    assert done.returncode == 2
    assert said in done.stderr


SEES = """
import os, pathlib, torch

def model():
    seen = [os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER")]
    (pathlib.Path(__file__).parent / f"rank{os.environ.get('RANK')}").write_text(" ".join(seen))
    return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
"""


@pytest.mark.parametrize(
    "listed", ["GPU-12ab-34,3", pytest.param("MIG-9f", marks=pytest.mark.full)]
)
def test_every_rank_is_shown_the_devices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listed: str
) -> None:
    """Without a GPU none is seen, whatever is listed; the ranks run on the CPU."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    plan = write_plan(tmp_path, "sees:model", SEES)
    done = run_command(
        *("run", "--config", plan, "--device", "cpu", "-pp", "2", "--devices", listed),
        *(str(tmp_path / "x.npy"), "--output", str(tmp_path / "out")),
    )
    assert done.returncode == 0, done.stderr
    seen = [(tmp_path / f"rank{rank}").read_text() for rank in (0, 1)]
    assert seen == [f"{listed} PCI_BUS_ID"] * 2
