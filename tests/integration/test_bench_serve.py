"""`shardline bench serve` against the real server, and against addresses where there is none."""

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoints import add_tokenizer, make_checkpoint
from processes import run_command
from servers import Server

from runner.bench.load.timeline import FORMULAS
from runner.cli.bench_serve_text import describe

pytestmark = pytest.mark.timeout(120)

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A tiny model that ends no answer early, behind a key."""
    folder = tmp_path_factory.mktemp("load") / "tiny"
    folder.mkdir()
    changes = {"vocab_size": 259, "max_position_embeddings": 256, "eos_token_id": None}
    make_checkpoint("llama", folder, **changes)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "key").write_text("secret\n")
    key = f"server.api_key_file={folder / 'key'}"
    with Server.start(add_tokenizer(folder), "--set", key) as server:
        yield server


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    (tmp_path / "key").write_text("secret")
    return tmp_path / "key"


def load(server: Server, key_file: Path, *more: str) -> dict[str, Any]:
    """The one object that --json prints."""
    given = ["--url", server.url, "--key-file", str(key_file), "--json", *more]
    # A proxy that the environment names is not the URL that was given.
    environment = {**os.environ, "HTTP_PROXY": "http://127.0.0.1:1", "ALL_PROXY": "http://[::1]:1"}
    done = run_command("bench", "serve", *given, environment=environment)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    assert report["server"]["model"] == "tiny"
    return report


def test_a_closed_loop_counts_what_the_server_counts(server: Server, key_file: Path) -> None:
    output = key_file.with_name("result.json")
    report = load(
        server,
        key_file,
        *("--concurrency", "4", "--requests", "9", "--input-len", "8:16", "--output-len", "6"),
        *("--slo", "ttft:60000", "--slo", "tpot:60000", "--output", str(output)),
    )
    assert json.loads(output.read_text()) == report
    result = report["result"]
    assert (result["num_requests"], result["num_complete"], result["errors"]) == (9, 9, {})
    # Bytes that are half a character come as one chunk with the rest of it.
    assert result["counted_by"] == ["usage"]
    assert result["output_tokens"] == 9 * 6
    assert 9 * 8 <= result["prompt_tokens"] <= 9 * 16
    assert result["tokens_per_chunk"] >= 1
    seconds = result["duration_s"]
    assert (
        result["requests_per_s"] == result["goodput_requests_per_s"] == pytest.approx(9 / seconds)
    )
    assert result["output_tokens_per_s"] == pytest.approx(54 / seconds)
    assert result["ttft_ms"]["count"] == result["tpot_ms"]["count"] == 9
    assert 0 < result["ttft_ms"]["min"] <= result["e2e_ms"]["max"] <= seconds * 1e3
    assert result["formulas"] == FORMULAS
    text = describe(report).splitlines()
    assert text[0] == f"tiny at {server.url}: 4 at a time, random prompts"
    assert text[1].startswith("9 of 9 requests complete in ")
    assert [line.split()[0] for line in text[4:8]] == ["ttft,", "tpot,", "itl,", "e2e,"]
    assert "within ttft:60000, tpot:60000 ms" in text[-1]


def test_an_open_loop_sends_for_its_duration(server: Server, key_file: Path) -> None:
    report = load(
        server,
        key_file,
        *("--request-rate", "30", "--duration", "1.5", "--input-len", "4", "--output-len", "2"),
    )
    result = report["result"]
    # 45 are expected, give or take 7: the seed draws the same number everywhere.
    assert 20 < result["num_requests"] == result["num_complete"] < 80
    assert result["duration_s"] > 1
    assert result["send_delay_ms"]["min"] >= 0
    assert report["workload"]["burstiness"] == 1.0


def test_chats_and_what_the_server_refuses(server: Server, key_file: Path) -> None:
    """Of a file of two prompts one is too long: it is an error of its kind, the other an answer."""
    file = key_file.with_name("chats.jsonl")
    chats = [[{"role": "user", "content": text}] for text in ("hello", "x" * 500)]
    file.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    more = ("--concurrency", "2", "--requests", "6", "--output-len", "3", "--warmup-requests", "0")
    report = load(server, key_file, "--data", "jsonl", "--data-file", str(file), *more)
    result = report["result"]
    assert (result["num_requests"], result["num_complete"]) == (6, 3)
    assert result["errors"]["HTTP 400"]["count"] == 3
    assert "max_model_len" in result["errors"]["HTTP 400"]["first"]
    assert result["output_tokens"] == 3 * 3
    assert "HTTP 400: 3 times; first: " in describe(report)


def test_an_extra_key_is_sent(server: Server, key_file: Path) -> None:
    """The server refuses a key that it does not know, so the first request fails."""
    given = ["--url", server.url, "--key-file", str(key_file), "--concurrency", "1"]
    done = run_command("bench", "serve", *given, "--extra-body", '{"min_tokens": 4}')
    assert done.returncode == 3
    assert len(done.stderr.splitlines()) == 1
    assert "HTTP 400" in done.stderr
    assert "min_tokens" in done.stderr


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        ([], 2, ["refuses the key", "HTTP 401", "--key-file"]),
        (["--key-file", "KEY", "--model", "other"], 2, ["--model other", "tiny"]),
        (["--key-file", "NONE"], 4, ["cannot read"]),
        (
            ["--url", "http://127.0.0.1:PORT"],
            3,
            ["no server answers at http://127.0.0.1:", "(Connection refused)"],
        ),
        (["--url", "localhost:8000"], 2, ["--url localhost:8000"]),
        (["--url", "URL/nowhere"], 3, ["lists no models", "HTTP 404"]),
        (["--request-rate", "5"], 2, ["either --request-rate", "or --concurrency"]),
        (["--burstiness", "2"], 2, ["--burstiness"]),
        (["--data", "jsonl"], 2, ["--data-file"]),
        (["--slo", "fast"], 2, ["--slo fast", "ttft:200"]),
        (["--extra-body", "[]"], 2, ["--extra-body []"]),
        (["--output", "/nowhere/x"], 2, ["--output /nowhere/x"]),
    ],
)
def test_a_mistake_is_one_clear_line(
    server: Server, key_file: Path, options: list[str], code: int, words: list[str]
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        places = {"KEY": str(key_file), "NONE": str(key_file) + ".none", "URL": server.url}
        places["PORT"] = str(unused.getsockname()[1])
        for name, value in places.items():
            options = [option.replace(name, value) for option in options]
        if options[:1] == ["--url"] and "nowhere" in options[1]:
            options += ["--key-file", str(key_file)]
        url = ["--url", server.url] if "--url" not in options else []
        done = run_command("bench", "serve", "--concurrency", "1", *url, *options)
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert [word for word in words if word not in done.stderr] == [], done.stderr
