"""Malformed requests, made from the servers' OpenAPI document and by hand: no 5xx, no dead server.

SHARDLINE_FUZZ_CASES says how many; `scripts/fuzz` asks for thousands.
"""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import httpx
import pytest
import schemathesis
from checkpoints import add_tokenizer, make_checkpoint
from hypothesis import HealthCheck, Phase, given, settings
from malformed import malformed, malformed_tensors, status_of
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from servers import Server

pytestmark = pytest.mark.dist

CASES = int(os.environ.get("SHARDLINE_FUZZ_CASES", "100"))
TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("fuzzed") / "tiny"
    folder.mkdir()
    make_checkpoint("llama", folder, vocab_size=259, max_position_embeddings=64, eos_token_id=None)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    with Server.start(add_tokenizer(folder), "--set", "server.max_request_bytes=20000") as server:
        yield server


def check_alive(server: Server) -> None:
    asked = {"prompt": "x", "max_tokens": 3}
    answer = httpx.post(f"{server.url}/v1/completions", json=asked, timeout=30)
    assert answer.json()["usage"]["completion_tokens"] == 3
    assert "Traceback" not in "".join(server.said), "".join(server.said)


@pytest.mark.timeout(1200)
def test_what_the_document_allows_and_what_it_does_not(server: Server) -> None:
    document = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [operation.ok() for operation in document.get_all_operations()]
    paths = {operation.path for operation in operations}
    assert {"/v1/completions", "/v1/chat/completions", "/v1/models", "/metrics"} <= paths
    num_cases = 0

    def answered_well(case: schemathesis.Case) -> None:
        nonlocal num_cases
        num_cases += 1
        case.call_and_validate(checks=[not_a_server_error], timeout=30)

    checked = settings(
        max_examples=CASES // 4,  # Two routes have bodies, good ones and spoiled ones.
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    for operation in operations:
        # A route that takes nothing has nothing to spoil.
        spoiled = [GenerationMode.NEGATIVE] if operation.method == "post" else []
        for mode in (GenerationMode.POSITIVE, *spoiled):
            strategy = operation.as_strategy(generation_mode=mode)
            checked(given(case=strategy)(answered_well))()
    assert num_cases >= CASES
    check_alive(server)


def statuses_of(
    server: Server, requests: Iterable[bytes], *, are_whole: bool = False
) -> list[int | None]:
    host, port = server.url.removeprefix("http://").split(":")
    statuses = []
    for request in requests:
        status = status_of((host, int(port)), request, is_whole=are_whole)
        assert status is None or status < 500, request
        statuses.append(status)
    return statuses


@pytest.mark.timeout(1200)
def test_bytes_that_no_client_should_send(server: Server) -> None:
    statuses = statuses_of(server, malformed(CASES))
    assert statuses.count(400) > CASES // 10, statuses
    check_alive(server)


@pytest.mark.timeout(1200)
def test_tensors_whose_sizes_lie(tmp_path: Path) -> None:
    (tmp_path / "fuzzed_model.py").write_text(
        "import torch\ndef make():\n    return torch.nn.Linear(4, 3)\n"
    )
    model = {
        "path": str(tmp_path),
        "factory": "fuzzed_model:make",
        "factory_path": str(tmp_path),
        "load_format": "dummy",
        "inputs": [{"name": "x", "shape": ["batch", 4]}],
    }
    plan = {"version": 1, "model": model, "security": {"factories": ["fuzzed_model:make"]}}
    (tmp_path / "plan.yaml").write_text(json.dumps(plan))
    options = ["--set", "server.max_request_bytes=20000", "--set", "server.model_name=net"]
    with Server.start(tmp_path / "plan.yaml", *options) as server:
        path = "/v2/models/net/infer"
        statuses = statuses_of(server, malformed_tensors(path, CASES), are_whole=True)
        assert statuses.count(400) > CASES // 2, statuses
        given = {"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}
        answer = httpx.post(f"{server.url}{path}", json={"inputs": [given]}, timeout=30)
        assert answer.json()["outputs"][0]["shape"] == [1, 3], answer.text
        assert "Traceback" not in "".join(server.said), "".join(server.said)
