"""`shardline run` over files: killed and run again, with bad files, with a model that fails."""

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from processes import processes_naming, rank_pid, run_command, start_command, wait_until_gone
from typer.testing import CliRunner, Result

from runner.cli.app import app

pytestmark = [pytest.mark.dist, pytest.mark.timeout(300)]

NUM_ITEMS = 200
GONE_WITHIN_S = 5.0

MODELS = '''
import torch
from torch import nn


class Net(nn.Module):
    """Some milliseconds a sample, so that a run can be killed in its middle."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.middle = nn.Conv2d(32, 32, 3, padding=1)
        self.head = nn.Conv2d(64, 4, 1)

    def forward(self, image):
        early = torch.relu(self.stem(image))
        late = torch.relu(self.middle(early))
        return {"mask": self.head(torch.cat([early, late], 1)), "score": late.mean((2, 3))}


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Linear(4, 4)
        self.table = nn.Embedding(10, 4)

    def forward(self, ids):
        return self.scale(ids.float()) + self.table(ids).sum(1)


class Pooled(nn.Module):
    """Its mean is of all columns, which a rank that holds some of them does not know."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(4, 6)

    def forward(self, x):
        return self.up(x).mean(-1, keepdim=True)


def make(name):
    torch.manual_seed(0)
    return globals()[name]()
'''

IMAGE = {"name": "image", "shape": ["batch", 3, 64, 64]}
IDS = {"name": "ids", "shape": ["batch", 4], "dtype": "int64"}
X = {"name": "x", "shape": ["batch", 4]}


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Where the models and the items lie; a test that fails must not spoil the next one."""
    (tmp_path / "run_models.py").write_text(MODELS)
    (tmp_path / "in").mkdir()
    yield tmp_path
    for pid in processes_naming(str(tmp_path)):
        os.kill(pid, signal.SIGKILL)


def arguments(folder: Path, name: str, given: dict[str, Any], **parallel: Any) -> list[str]:
    """What runs the items of the folder through a model."""
    plan = {
        "version": 1,
        "model": {
            "path": str(folder),
            "factory": "run_models:make",
            "factory_path": str(folder),
            "factory_args": {"name": name},
            "load_format": "dummy",
            "inputs": [given],
        },
        "security": {"factories": ["run_models:make"]},
        "parallel": {"device": "cpu", **parallel},
        "scheduler": {"max_batch_size": 2},
    }
    file = folder / "plan.yaml"
    file.write_text(yaml.safe_dump(plan))
    return ["run", "--config", str(file), str(folder / "in"), "--output", str(folder / "out")]


def results(folder: Path) -> list[Path]:
    """Those that are whole."""
    return sorted((folder / "out").glob("*.npz"))


def stats(folder: Path) -> dict[str, tuple[int, int]]:
    """Of every result, inode and time of writing."""
    found = {path.name: path.stat() for path in results(folder)}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in found.items()}


def kill_at(folder: Path, command: list[str], count: int, *, rank: int | None) -> tuple[int, str]:
    """Kill the launcher or a rank once there are so many results: the exit code, and what the
    command said last.
    """
    job = start_command(*command)
    while len(results(folder)) < count:
        assert job.poll() is None, job.communicate()
        time.sleep(0.002)
    pid = job.pid if rank is None else rank_pid(str(folder), rank)
    os.kill(pid, signal.SIGKILL)
    _, errors = job.communicate(timeout=60)
    assert wait_until_gone(str(folder), timeout_s=GONE_WITHIN_S) == []
    assert len(results(folder)) < NUM_ITEMS
    return job.returncode, errors.splitlines()[-1]


@pytest.mark.full
def test_a_run_that_is_killed_goes_on_and_writes_each_result_once(folder: Path) -> None:
    generator = np.random.default_rng(0)
    for index in range(NUM_ITEMS):
        image = generator.standard_normal((3, 64, 64), dtype=np.float32)
        np.save(folder / "in" / f"item{index:03d}.npy", image)
    command = arguments(folder, "Net", IMAGE, pipeline_parallel_size=2)

    code, _ = kill_at(folder, command, 20, rank=None)
    assert code == -signal.SIGKILL
    after_launcher = stats(folder)
    code, said = kill_at(folder, command, len(after_launcher) + 20, rank=1)
    assert code == 8
    assert "rank 1 (stage 1, tp rank 0): killed by SIGKILL" in said
    after_rank = stats(folder)
    assert after_launcher.items() <= after_rank.items()

    done = run_command(*command, "--json", timeout_s=200)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["finished"] == NUM_ITEMS
    assert told["samples"] == NUM_ITEMS - len(after_rank)
    at_end = stats(folder)
    assert len(at_end) == NUM_ITEMS
    assert after_rank.items() <= at_end.items()
    left = {path.name for path in (folder / "out").iterdir()} - at_end.keys()
    assert left == {"run.json"}
    assert_right(folder)

    again = run_command(*command, "--json")
    assert json.loads(again.stdout)["samples"] == 0
    assert stats(folder) == at_end


def assert_right(folder: Path) -> None:
    """Every result is what plain torch makes of its item."""
    names: dict[str, Any] = {}
    exec(MODELS, names)
    net = names["make"]("Net").eval()
    for path in results(folder):
        image = torch.from_numpy(np.load(folder / "in" / f"{path.stem}.npy"))
        with torch.no_grad():
            expected = net(image[None])
        found = np.load(path)
        assert sorted(found) == ["mask", "score"]
        for name, tensor in expected.items():
            error = np.abs(found[name] - tensor[0].numpy()).max()
            assert error <= 1e-4 * tensor.abs().max().item()


def invoke(command: list[str]) -> Result:
    """In this process, on one rank."""
    return CliRunner().invoke(app, command)


def test_bad_items_are_named_and_do_not_stop_the_rest(folder: Path) -> None:
    for index in range(6):
        np.save(folder / "in" / f"good{index}.npy", np.full(4, index))
    np.save(folder / "in" / "long.npy", np.zeros(5, dtype=np.int64))
    (folder / "in" / "torn.npy").write_bytes(b"\x93NUMPY")
    command = arguments(folder, "Table", IDS)

    first = invoke(command)
    assert getattr(first.exception, "exit_code", None) == 4
    assert "2 items of 8 failed" in str(first.exception)
    assert [path.stem for path in results(folder)] == [f"good{index}" for index in range(6)]
    lines = [json.loads(line) for line in (folder / "out" / "errors.jsonl").open()]
    assert sorted(line["item"] for line in lines) == ["long", "torn"]

    np.save(folder / "in" / "long.npy", np.zeros(4, dtype=np.int64))
    (folder / "in" / "torn.npy").unlink()
    before = stats(folder)
    second = invoke(command)
    assert second.exception is None, second.exception
    assert before.items() <= stats(folder).items()
    assert len(stats(folder)) == 7


def test_a_folder_of_something_else_is_refused_before_there_are_ranks(folder: Path) -> None:
    np.save(folder / "in" / "good.npy", np.zeros(4, dtype=np.int64))
    two_stages = arguments(folder, "Table", IDS, split_points=["table"])
    assert run_command(*two_stages).returncode == 0
    before = stats(folder)
    code = (folder / "run_models.py").read_text()
    (folder / "mine").mkdir()
    (folder / "mine" / "thesis.npz").touch()
    failed = run_command(*two_stages, "--format", "npy")
    assert failed.returncode == 2
    assert 'of a run with format="npz", this one has "npy"' in failed.stderr
    assert "ranks" not in failed.stderr
    other = invoke([*two_stages, "--output", str(folder / "mine")])
    assert getattr(other.exception, "exit_code", None) == 2
    assert "holds thesis.npz and no run.json" in str(other.exception)
    (folder / "run_models.py").write_text(code + "\n")
    changed = run_command(*two_stages)
    assert changed.returncode == 2
    assert 'of a run with source={"run_models.py": ' in changed.stderr
    assert stats(folder) == before


@pytest.mark.parametrize("flag", [("--temperature", "0"), ("--stop", "x"), ("--order", "input")])
def test_what_is_for_language_models_is_refused(flag: tuple[str, str], folder: Path) -> None:
    np.save(folder / "in" / "good.npy", np.zeros(4, dtype=np.int64))
    failed = invoke([*arguments(folder, "Table", IDS), *flag])
    assert getattr(failed.exception, "exit_code", None) == 2
    assert str(failed.exception) == (
        f"{flag[0]} is for language models, and run_models:make is a tensor model; leave it out"
    )
    assert not (folder / "out").exists()


def test_a_model_that_raises_ends_the_job_and_names_the_stage(folder: Path) -> None:
    for index in range(8):
        np.save(folder / "in" / f"good{index}.npy", np.full(4, index))
    np.save(folder / "in" / "large.npy", np.full(4, 10))
    command = arguments(folder, "Table", IDS, split_points=["table"])
    failed = run_command(*command)
    assert failed.returncode == 8
    last = failed.stderr.splitlines()[-1]
    assert "rank 1 (stage 1, tp rank 0): IndexError while computing its stage" in last
    assert "Traceback" in failed.stderr
    assert "in run" in failed.stderr
    assert wait_until_gone(str(folder), timeout_s=GONE_WITHIN_S) == []


def test_a_model_that_raises_on_one_rank_ends_the_job(folder: Path) -> None:
    np.save(folder / "in" / "large.npy", np.full(4, 10))
    failed = invoke(arguments(folder, "Table", IDS))
    assert getattr(failed.exception, "exit_code", None) == 8
    assert str(failed.exception).startswith("IndexError while running the pipeline")


@pytest.mark.full
def test_a_wrong_tp_plan_is_found_before_any_item_is_computed(folder: Path) -> None:
    np.save(folder / "in" / "x.npy", np.zeros(4))
    tp_plan = {"up": "colwise"}
    command = arguments(folder, "Pooled", X, tensor_parallel_size=2, tp_plan=tp_plan)
    failed = run_command(*command)
    assert failed.returncode == 7, failed.stderr
    assert "output output is not that of the whole model" in failed.stderr
    assert "parallel.tp_plan" in failed.stderr
    assert not (folder / "out").exists()
