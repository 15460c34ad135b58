"""`shardline serve` with tensor models and its clients: tritonclient, and some that misbehave."""

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
import yaml
from hang import may_hang
from plan_file import factory_plan
from processes import processes_naming, rank_pid, wait_until_gone
from servers import Server, wait_for
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException

pytestmark = [pytest.mark.dist, pytest.mark.timeout(300)]

MODELS = """
import time

import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(4, 8)
        self.down = nn.Linear(8, 3)

    def forward(self, x):
        hidden = torch.relu(self.up(x))
        return {"y": self.down(hidden), "best": self.down(hidden).argmax(-1)}


class Slow(Net):
    def __init__(self):
        super().__init__()
        self.wide = nn.Linear(4, 3000)
        self.deep = nn.Sequential(*(nn.Linear(3000, 3000) for _ in range(24)))

    def forward(self, x):
        return self.deep(self.wide(x)).mean(-1, keepdim=True)


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(10, 4)
        self.scale = nn.Linear(4, 4)

    def forward(self, ids):
        return {"rows": self.scale(self.table(ids)), "even": ids % 2 == 0}


def make(name):
    torch.manual_seed(0)
    return globals()[name]()
"""
X = {"name": "x", "shape": ["batch", 4]}
IDS = {"name": "ids", "shape": ["batch", 2], "dtype": "int64"}


def plan_of(folder: Path, name: str, given: dict[str, Any], **scheduler: Any) -> Path:
    """The configuration of one of the models."""
    (folder / "served_models.py").write_text(MODELS)
    plan = factory_plan(folder, "served_models:make", given, factory_args={"name": name})
    plan |= {
        "scheduler": {"max_batch_size": 8, "max_queue_delay_ms": 100, **scheduler},
        "server": {"model_name": "net"},
    }
    file = folder / "plan.yaml"
    file.write_text(yaml.safe_dump(plan))
    return file


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One rank."""
    plan = plan_of(tmp_path_factory.mktemp("net"), "Net", X)
    with Server.start(plan, "--set", "server.max_request_bytes=20000") as server:
        yield server


@pytest.fixture(autouse=True)
def _leave_nothing(tmp_path: Path) -> Iterator[None]:
    """A test that fails must not spoil the next one."""
    yield
    for pid in processes_naming(str(tmp_path)):
        os.kill(pid, signal.SIGKILL)


def client_of(server: Server) -> InferenceServerClient:
    return InferenceServerClient(server.url.removeprefix("http://"), network_timeout=60)


def infer(
    server: Server, x: np.ndarray, *, is_binary: bool = True, outputs: tuple[str, ...] = ("y",)
) -> Any:
    given = InferInput("x", list(x.shape), "FP32")
    given.set_data_from_numpy(x, binary_data=is_binary)
    wanted = [InferRequestedOutput(name, binary_data=is_binary) for name in outputs]
    return client_of(server).infer("net", [given], outputs=wanted, request_id="seven")


def samples(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 4)).astype(np.float32)


def net(x: np.ndarray) -> np.ndarray:
    """What the model computes, without shardline."""
    names: dict[str, Any] = {}
    exec(MODELS, names)
    with torch.inference_mode():
        return names["make"]("Net")(torch.from_numpy(x))["y"].numpy()


def test_the_protocols_client_learns_what_there_is(server: Server) -> None:
    client = client_of(server)
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("net")
    assert client.is_model_ready("net", "1")
    assert not client.is_model_ready("net", "2")
    assert client.get_server_metadata()["extensions"] == ["binary_tensor_data"]
    assert client.get_model_metadata("net") == client.get_model_metadata("net", "1")
    assert client.get_model_metadata("net") == {
        "name": "net",
        "versions": ["1"],
        "platform": "shardline",
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}],
        "outputs": [
            {"name": "y", "datatype": "FP32", "shape": [-1, 3]},
            {"name": "best", "datatype": "INT64", "shape": [-1]},
        ],
    }


@pytest.mark.parametrize("is_binary", [True, False])
def test_answers_are_the_models(server: Server, is_binary: bool) -> None:
    for count in (1, 3, 19):
        x = samples(count)
        answer = infer(server, x, is_binary=is_binary, outputs=("best", "y"))
        assert [o["name"] for o in answer.get_response()["outputs"]] == ["best", "y"]
        assert answer.get_response()["id"] == "seven"
        np.testing.assert_allclose(answer.as_numpy("y"), net(x), rtol=1e-5, atol=1e-6)
        assert (answer.as_numpy("best") == net(x).argmax(-1)).all()


def test_all_outputs_come_if_none_is_named(server: Server) -> None:
    x = samples(2)
    body = {"inputs": [{"name": "x", "shape": [2, 4], "datatype": "FP32", "data": x.tolist()}]}
    answer = httpx.post(f"{server.url}/v2/models/net/infer", json=body).json()
    assert (answer["model_name"], answer["model_version"]) == ("net", "1")
    assert [(o["name"], o["shape"]) for o in answer["outputs"]] == [("y", [2, 3]), ("best", [2])]
    assert "id" not in answer
    np.testing.assert_allclose(answer["outputs"][0]["data"], net(x).ravel(), rtol=1e-5, atol=1e-6)


@pytest.mark.full
def test_two_stages_batch_sixteen_at_once(tmp_path: Path) -> None:
    """Every answer is what the request gets alone."""
    with Server.start(plan_of(tmp_path, "Net", X), "-pp", "2") as server:
        counts = [1 + n % 2 for n in range(16)]
        alone = [infer(server, samples(count, n)).as_numpy("y") for n, count in enumerate(counts)]
        before = server.metric("batch_size_count"), server.metric("batch_size_sum")
        with ThreadPoolExecutor(16) as pool:
            asked = pool.map(
                lambda n: infer(server, samples(counts[n], n), is_binary=n % 3 > 0), range(16)
            )
            together = [answer.as_numpy("y") for answer in asked]
        for one, other in zip(alone, together, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)
        assert server.metric("batch_size_sum") - before[1] == sum(counts)
        assert server.metric("batch_size_count") - before[0] < 16
        assert server.metric('batches_total{reason="delay"}') >= 1
        assert server.metric('request_success_total{finished_reason="completed"}') == 32
        assert server.metric("request_queue_time_seconds_count") == 2 * sum(counts)
        assert server.metric("batch_seconds_sum") > 0
        server.terminate()
        assert server.process.wait(20) == 0, "".join(server.said)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"name": "z"}, "the model takes each of x once"),
    ({"shape": [1, 5]}, "its shape is (1, 5); the model takes (*, 4)"),
    ({"shape": [4]}, "its shape"),
    ({"shape": [2, 4]}, "takes 8 values"),
    ({"shape": [0, 4]}, "shape"),
    ({"shape": [-1, 4]}, "shape"),
    ({"shape": [10**30, 4]}, "values"),
    ({"datatype": "FP64"}, "its datatype is FP64; the model takes FP32"),
    ({"datatype": "BYTES"}, "BYTES"),
    ({"data": ["a", 1, 2, 3]}, "no FP32"),
    ({"data": [True, 1, 2, 3]}, "no FP32"),
    ({"data": [[1, 2], [3, 4]]}, "nested"),
    ({"data": [1e300, 1, 2, 3]}, "beyond FP32"),
    ({"data": [10**400, 1, 2, 3]}, "beyond FP32"),
    ({"data": None}, "either data or binary_data_size"),
    ({"parameters": {"binary_data_size": 16}}, "either data or binary_data_size"),
    ({"parameters": {"shared_memory_region": "r"}}, "shared_memory_region"),
    ({"contents": {}}, "contents"),
]
GOOD = {"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}


def test_what_cannot_be_answered_is_told_in_the_protocols_shape(server: Server) -> None:
    with httpx.Client(base_url=server.url, timeout=30) as client:

        def refused(body: Any, told: str, *, status: int = 400, path: str = "net/infer") -> None:
            answer = client.post(f"/v2/models/{path}", json=body)
            assert answer.status_code == status, (body, answer.text)
            assert told in answer.json()["error"], (body, answer.text)

        for change, told in BAD:
            refused({"inputs": [GOOD | change]}, told)
        refused({"inputs": [GOOD, GOOD]}, "once")
        refused({"inputs": []}, "inputs are none")
        refused({"inputs": [GOOD], "outputs": [{"name": "z"}]}, "use any of y, best")
        refused({"inputs": [GOOD], "outputs": [{"name": "y"}] * 2}, "each once")
        refused({"inputs": [GOOD], "parameters": {"sequence_id": 5}}, "sequence_id")
        many = GOOD | {"shape": [300, 4], "data": [0] * 1200}
        refused({"inputs": [many]}, "the queue holds 256")
        refused({"inputs": [GOOD]}, "'other'", status=404, path="other/infer")
        refused({"inputs": [GOOD]}, "'2'", status=404, path="net/versions/2/infer")
        refused({"inputs": [GOOD]}, "Not Found", status=404, path="../../etc/passwd")
        refused({"inputs": [GOOD], "id": "x" * 20000}, "20000 bytes", status=413)
        zipped = client.post(
            "/v2/models/net/infer", content=b"x", headers={"Content-Encoding": "gzip"}
        )
        assert zipped.status_code == 415
    with pytest.raises(InferenceServerException, match="its shape is"):
        infer(server, np.zeros((1, 5), np.float32))


def test_nan_comes_as_bytes_and_not_as_json(server: Server) -> None:
    x = np.full((1, 4), np.nan, np.float32)
    assert np.isnan(infer(server, x).as_numpy("y")).all()
    with pytest.raises(InferenceServerException, match="ask for it with binary_data"):
        infer(server, x, is_binary=False)


def test_an_item_that_makes_the_model_raise_fails_alone(tmp_path: Path) -> None:
    with Server.start(plan_of(tmp_path, "Table", IDS)) as server:

        def look_up(number: int) -> Any:
            given = InferInput("ids", [1, 2], "INT64")
            given.set_data_from_numpy(np.full((1, 2), number))
            try:
                return client_of(server).infer("net", [given]).as_numpy("rows").tolist()
            except InferenceServerException as error:
                return str(error)

        alone = [look_up(number) for number in range(4)]
        with ThreadPoolExecutor(5) as pool:
            together = list(pool.map(look_up, [0, 1, 10, 2, 3]))
        assert "the model raises IndexError for these inputs" in together.pop(2)
        np.testing.assert_allclose(together, alone, rtol=1e-6)
        server.terminate()
        assert server.process.wait(20) == 0


@pytest.mark.full
def test_with_several_ranks_inputs_that_make_the_model_raise_end_the_job(tmp_path: Path) -> None:
    with Server.start(plan_of(tmp_path, "Table", IDS), "-pp", "2") as server:
        given = InferInput("ids", [1, 2], "INT64")
        given.set_data_from_numpy(np.full((1, 2), 10))
        with pytest.raises(InferenceServerException, match="ended"):
            client_of(server).infer("net", [given])
        assert server.process.wait(20) == 8
        said = "".join(server.said)
    assert "shardline: rank 0 (stage 0, tp rank 0): " in said
    assert "IndexError" in said
    assert wait_until_gone(str(tmp_path), timeout_s=5) == []


def test_limits_and_the_key(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("secret\n")
    options = ["--set", f"server.api_key_file={tmp_path / 'key'}"]
    plan = plan_of(tmp_path, "Slow", X, max_batch_size=1, max_queue_size=2)
    with Server.start(plan, *options) as server:
        client = client_of(server)
        assert client.is_server_ready()
        with pytest.raises(InferenceServerException, match="no key, or a wrong one"):
            client.get_model_metadata("net")

        def ask(_: int) -> httpx.Response:
            body = {"inputs": [GOOD]}
            key = {"Authorization": "Bearer secret"}
            url = f"{server.url}/v2/models/net/infer"
            return httpx.post(url, json=body, headers=key, timeout=60)

        with ThreadPoolExecutor(24) as pool:
            answers = list(pool.map(ask, range(24)))
        codes = [answer.status_code for answer in answers]
        assert set(codes) == {200, 429}
        assert all(a.headers["retry-after"] == "1" for a in answers if a.status_code == 429)
        body = {"inputs": [GOOD], "parameters": {"timeout": 1}}
        late = httpx.post(
            f"{server.url}/v2/models/net/infer",
            json=body,
            headers={"Authorization": "Bearer secret"},
        )
        assert late.status_code == 408


def test_the_more_urgent_of_those_that_wait_goes_first(tmp_path: Path) -> None:
    ended: list[int] = []
    with Server.start(
        plan_of(tmp_path, "Slow", X, max_batch_size=1, max_queue_delay_ms=60_000)
    ) as server:

        def ask(priority: int) -> None:
            body = {"inputs": [GOOD], "parameters": {"priority": priority}}
            answer = httpx.post(f"{server.url}/v2/models/net/infer", json=body, timeout=60)
            assert answer.status_code == 200, answer.text
            ended.append(priority)

        with ThreadPoolExecutor(20) as pool:
            asked = [pool.submit(ask, 0) for _ in range(16)]
            wait_for(lambda: server.metric("num_requests_waiting") >= 10)
            asked += [pool.submit(ask, priority) for priority in (2, 1)]
            for answer in asked:
                answer.result()
        # Some had begun before these came.
        assert ended.index(1) < len(ended) - 4
        assert ended.index(2) < len(ended) - 4
        body = {"inputs": [GOOD], "parameters": {"priority": -1}}
        refused = httpx.post(f"{server.url}/v2/models/net/infer", json=body)
        assert refused.status_code == 400
        assert "priority" in refused.text


def test_sigterm_answers_what_is_open_and_takes_no_more(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "Net", X, max_queue_delay_ms=4000)
    with Server.start(plan) as server, ThreadPoolExecutor(2) as pool:
        asked = pool.submit(infer, server, samples(2))
        wait_for(lambda: server.metric("num_requests_waiting") == 2)
        server.terminate()
        wait_for(lambda: httpx.get(f"{server.url}/v2/health/ready").status_code == 503)
        with pytest.raises(InferenceServerException, match="draining"):
            infer(server, samples(1))
        assert asked.result().as_numpy("y").shape == (2, 3)
        assert server.process.wait(20) == 0, "".join(server.said)


@pytest.mark.full
def test_a_loop_that_hangs_ends_the_job_and_its_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hang = may_hang(tmp_path, monkeypatch)
    plan = plan_of(tmp_path, "Net", X)
    with Server.start(plan, "--set", "distributed.collective_timeout_s=3") as server:
        assert infer(server, samples(1)).as_numpy("y").shape == (1, 3)
        assert server.metric('rank_step_seconds_count{rank="0",stage="0"}') == 1
        assert 0 <= server.metric("pipeline_bubble") < 1
        hang(0)
        time.sleep(0.5)
        with pytest.raises(InferenceServerException, match="has stalled: rank 0"):
            infer(server, samples(1))
        assert server.process.wait(20) == 9
        said = "".join(server.said)
    assert "in hang_here" in said
    assert "rank 0 (stage 0, tp rank 0): no progress for" in said


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.full), 1])
def test_a_rank_that_stalls_while_nobody_asks_is_named(tmp_path: Path, rank: int) -> None:
    limits = ("server.stall_timeout_s=3", "distributed.collective_timeout_s=8")
    options = [word for limit in limits for word in ("--set", limit)]
    plan = plan_of(tmp_path, "Net", X)
    with Server.start(plan, "-pp", "2", *options) as server, httpx.Client() as client:
        assert client.get(f"{server.url}/v2/health/live").json() == {"live": True}
        os.kill(rank_pid(str(tmp_path), rank), signal.SIGSTOP)
        if rank > 0:
            wait_for(lambda: client.get(f"{server.url}/health/live").status_code == 503)
            assert f"rank {rank} (stage" in client.get(f"{server.url}/health/live").text
            for path in ("live", "ready"):
                answer = client.get(f"{server.url}/v2/health/{path}")
                assert (answer.status_code, answer.json()) == (503, {path: False})
        assert server.process.wait(40) == 9
        said = "".join(server.said)
    assert f"rank {rank} (stage {rank}, tp rank 0)" in said
    assert wait_until_gone(str(tmp_path), timeout_s=5) == []


def test_a_rank_that_dies_ends_the_job_and_its_requests(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "Net", X)
    with Server.start(plan, "-pp", "2") as server, ThreadPoolExecutor(2) as pool:
        victim = rank_pid(str(tmp_path), 1)
        os.kill(victim, signal.SIGSTOP)
        asked = pool.submit(infer, server, samples(1))
        wait_for(lambda: server.metric("num_requests_running") == 1)
        os.kill(victim, signal.SIGKILL)
        with pytest.raises(InferenceServerException):
            asked.result()
        assert server.process.wait(20) == 8
        assert "rank 1 (stage 1, tp rank 0): killed by SIGKILL" in server.said[-1]
        assert wait_until_gone(str(tmp_path), timeout_s=5) == []
