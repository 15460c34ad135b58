"""`shardline serve` and its clients: the openai package, and some that do not behave."""

import http.client
import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from checkpoints import add_tokenizer, load_reference, make_checkpoint, reference_logits
from processes import held_rank, processes_naming, run_command
from safetensors.torch import load_file, save_file
from servers import Server, wait_for
from streams import silent_stream

from runner.text.token_bytes import bytes_of
from runner.text.tokenizer import Tokenizer

pytestmark = [pytest.mark.dist, pytest.mark.timeout(300)]

TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
LONG = 3000
"""Tokens of an answer that takes seconds."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "tiny"
    folder.mkdir()
    # Nothing but its length ends an answer.
    changes = {"vocab_size": 259, "max_position_embeddings": 4096, "eos_token_id": None}
    make_checkpoint("llama", folder, **changes)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return add_tokenizer(folder)


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Server]:
    """One rank."""
    with Server.start(model, "--set", "server.max_request_bytes=20000") as server:
        yield server


def complete(server: Server, prompt: str, max_tokens: int = 12, **more: Any) -> Any:
    return server.client().completions.create(
        model="tiny", prompt=prompt, max_tokens=max_tokens, temperature=0, **more
    )


def test_answers_are_those_of_generate(server: Server, model: Path) -> None:
    given = ["--model", str(model), "--device", "cpu", "--max-tokens", "12", "--temperature", "0"]
    done = run_command("generate", *given, "--prompt", "one", "--json")
    expected = json.loads(done.stdout)["text"]
    answer = complete(server, "one")
    assert answer.choices[0].text == expected
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 12)
    assert complete(server, [ord_id(c) for c in "one"]).choices[0].text == expected
    events = list(complete(server, "one", stream=True, stream_options={"include_usage": True}))
    assert "".join(event.choices[0].text for event in events[:-1]) == expected
    assert len(events) > 4
    assert events[-2].choices[0].finish_reason == "length"
    assert events[-1].usage.total_tokens == 15
    done = run_command("generate", *given, "--prompt", "one", "--chat", "--json")
    expected = json.loads(done.stdout)["text"]
    asked: Any = {"messages": [{"role": "user", "content": "one"}], "max_completion_tokens": 12}
    chats = server.client().chat.completions
    chat = chats.create(model="tiny", temperature=0, **asked)
    assert chat.choices[0].message.content == expected
    deltas = [
        e.choices[0].delta for e in chats.create(model="tiny", temperature=0, stream=True, **asked)
    ]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == expected


def ord_id(character: str) -> int:
    """The token id of an ASCII letter, as `add_tokenizer` numbers them."""
    from tokenizers import pre_tokenizers

    return 3 + sorted(pre_tokenizers.ByteLevel.alphabet()).index(character)


def test_a_stop_string_may_cross_tokens(server: Server) -> None:
    whole = complete(server, "stop here", 40).choices[0].text
    stop = whole[6:9]
    answer = complete(server, "stop here", 40, stop=[stop])
    assert answer.choices[0].text == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    events = list(complete(server, "stop here", 40, stop=stop, stream=True))
    assert "".join(e.choices[0].text for e in events) == whole[: whole.index(stop)]


def test_logprobs_of_a_completion_are_those_of_transformers(server: Server, model: Path) -> None:
    whole = complete(server, "odds", 10, logprobs=3)
    told = whole.choices[0].logprobs
    tokenizer = Tokenizer.load(model)
    ids = [letter_id(token, tokenizer) for token in told.tokens]
    prompt = [ord_id(c) for c in "odds"]
    logits = reference_logits(load_reference(model), prompt + ids)[len(prompt) - 1 : -1]
    expected = logits.log_softmax(-1)
    of_chosen = expected.gather(-1, torch.tensor(ids)[:, None])[:, 0]
    assert told.token_logprobs == pytest.approx(of_chosen.tolist(), abs=1e-4)
    for place, top in enumerate(told.top_logprobs):
        values, top_ids = expected[place].topk(3)
        assert [letter_id(token, tokenizer) for token in top] == top_ids.tolist()
        assert list(top.values()) == pytest.approx(values.tolist(), abs=1e-4)
    assert told.text_offset[0] == 0
    for token, start in zip(told.tokens, told.text_offset, strict=True):
        assert token.startswith("bytes:") or whole.choices[0].text[start:].startswith(token)
    events = list(complete(server, "odds", 10, logprobs=3, stream=True))
    pieces = [e.choices[0].logprobs for e in events if e.choices[0].logprobs]
    for field in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        streamed = [value for piece in pieces for value in getattr(piece, field)]
        assert streamed == getattr(told, field)
    # Who does not ask gets none, beside who does.
    assert complete(server, "odds", 10).choices[0].logprobs is None
    stopped = complete(server, "odds", 10, logprobs=0, stop=[whole.choices[0].text[4:6]])
    assert stopped.choices[0].finish_reason == "stop"
    given = stopped.choices[0].logprobs
    assert len(given.tokens) == stopped.usage.completion_tokens
    assert [len(top) for top in given.top_logprobs] == [1] * len(given.tokens)


def letter_id(token: str, tokenizer: Tokenizer) -> int:
    """The token id of what the API calls a token of `add_tokenizer`."""
    written = token.encode()
    if token.startswith("bytes:"):
        written = bytes.fromhex(token.removeprefix("bytes:").replace("\\x", ""))
    return next(i for i in range(259) if bytes_of(tokenizer, i) == written)


def test_logprobs_of_a_chat_agree_whole_and_streamed(server: Server) -> None:
    chats = server.client().chat.completions
    asked: Any = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "odds"}],
        "max_tokens": 10,
        "temperature": 0,
        "logprobs": True,
    }
    whole = chats.create(**asked, top_logprobs=4)
    told = whole.choices[0].logprobs.content
    assert len(told) == whole.usage.completion_tokens == 10
    for entry in told:
        assert len(entry.top_logprobs) == 4
        best = entry.top_logprobs[0]
        assert (best.token, best.logprob, best.bytes) == (entry.token, entry.logprob, entry.bytes)
        logarithms = [top.logprob for top in entry.top_logprobs]
        assert logarithms == sorted(logarithms, reverse=True)
    shown = [bytes(entry.bytes) for entry in told if not entry.token.startswith("<")]
    assert b"".join(shown).decode(errors="replace") == whole.choices[0].message.content
    events = list(chats.create(**asked, top_logprobs=4, stream=True))
    pieces = [e.choices[0].logprobs for e in events if e.choices[0].logprobs]
    assert [entry for piece in pieces for entry in piece.content] == told
    alone = chats.create(**asked)
    assert [entry.top_logprobs for entry in alone.choices[0].logprobs.content] == [[]] * 10


def answer_by(way: int, server: Server, prompt: str, max_tokens: int) -> str:
    """The text of an answer: of a completion or of a chat, whole or streamed."""
    is_chat, is_streamed = way >= 2, bool(way % 2)
    common = {"model": "tiny", "max_tokens": max_tokens, "temperature": 0, "stream": is_streamed}
    client = server.client()
    answers: Any
    if is_chat:
        messages = [{"role": "user", "content": prompt}]
        answers = client.chat.completions.create(messages=messages, **common)  # type: ignore[call-overload]
    else:
        answers = client.completions.create(prompt=prompt, **common)  # type: ignore[call-overload]
    choices = [event.choices[0] for event in answers] if is_streamed else answers.choices
    if not is_chat:
        return "".join(choice.text for choice in choices)
    said = [choice.delta if is_streamed else choice.message for choice in choices]
    return "".join(part.content or "" for part in said)


def num_ended(server: Server, reason: str) -> float:
    """Requests so far that ended like this."""
    try:
        return server.metric(f'request_success_total{{finished_reason="{reason}"}}')
    except AssertionError:
        return 0.0  # None yet.


def test_many_at_once_get_what_each_gets_alone(model: Path) -> None:
    """On two stages of two ranks, with fewer places than requests."""
    cut = ["-tp", "2", "-pp", "2", "--set", "scheduler.max_num_seqs=16"]
    with Server.launch(model, *cut) as server:
        with held_rank(str(model), 3):
            server.wait_until_listening()
            # It joins the others, or not.
            wait_for(lambda: len(set(server.startup().json()["ranks"])) > 1, seconds=60)
            assert server.startup().status_code == 503
            starting = server.startup().json()
            assert starting["status"] == "starting"
            assert len(starting["ranks"]) == 4
        server.wait_until_ready()
        assert server.startup().json() == {"status": "ready"}
        prompts = [f"{'x' * (n % 40)}{n}" for n in range(32)]

        def answer(n: int) -> str:
            return answer_by(n % 4, server, prompts[n], 4 + n % 9)

        # Each of half as many is asked twice.
        alone = [answer(n) for n in range(32)]
        with ThreadPoolExecutor(64) as pool:
            assert list(pool.map(answer, [*range(32)] * 2)) == alone * 2
        wait_for(lambda: server.metric("kv_cache_usage_perc") == 0, seconds=10)
        assert server.metric("prefix_cache_hits_total") > 0
        assert server.metric("generation_tokens_total") == 3 * sum(4 + n % 9 for n in range(32))
        server.terminate()
        assert server.process.wait(20) == 0, "".join(server.said)


def test_a_client_that_leaves_frees_its_blocks(server: Server) -> None:
    def ends() -> list[float]:
        return [num_ended(server, reason) for reason in ("cancelled", "length")]

    num_cancelled, num_whole = ends()
    stream = complete(server, "gone", LONG, stream=True)
    next(iter(stream))
    assert server.metric("num_requests_running") == 1
    num_tokens = server.metric("generation_tokens_total")
    stream.close()
    wait_for(lambda: server.metric("kv_cache_usage_perc") == 0, seconds=3)
    assert server.metric("generation_tokens_total") - num_tokens < LONG / 4
    assert ends() == [num_cancelled + 1, num_whole]
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{server.url}/v1/completions",
            json={"prompt": "gone", "max_tokens": LONG},
            timeout=0.5,
        )
    wait_for(lambda: server.metric("kv_cache_usage_perc") == 0, seconds=3)
    assert ends() == [num_cancelled + 2, num_whole]


def test_a_request_that_takes_too_long_is_ended(server: Server) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        complete(server, "late", LONG, extra_body={"timeout": 0.3})
    assert caught.value.status_code == 408
    wait_for(lambda: server.metric("kv_cache_usage_perc") == 0, seconds=3)


def test_a_client_that_never_reads_holds_nobody_up(server: Server) -> None:
    with silent_stream(server, LONG):
        assert complete(server, "quick").choices[0].finish_reason == "length"
        assert server.metric("num_requests_running") == 1
    wait_for(lambda: server.metric("kv_cache_usage_perc") == 0, seconds=20)


OK = {"prompt": "x", "max_tokens": 1}
CHAT = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
BAD: list[tuple[Any, str]] = [
    ({}, "prompt"),
    ([], "object"),
    ("x", "object"),
    ({"prompt": ""}, "empty"),
    ({"prompt": 1}, "prompt"),
    ({"prompt": [-1]}, "token id"),
    ({"prompt": [10**30]}, "token id"),
    ({"prompt": ["a"]}, "prompt"),
    ({"prompt": "x" * 5000}, "5000 tokens"),
    (OK | {"max_tokens": 0}, "max_tokens"),
    (OK | {"max_tokens": -5}, "max_tokens"),
    (OK | {"max_tokens": "7"}, "max_tokens"),
    (OK | {"temperature": -1}, "temperature"),
    (OK | {"temperature": "hot"}, "temperature"),
    (OK | {"top_p": 0}, "top_p"),
    (OK | {"top_p": 2}, "top_p"),
    (OK | {"top_k": -1}, "top_k"),
    (OK | {"top_k": 10**400}, "top_k"),
    (OK | {"temperature": 1e-300}, "temperature"),
    (OK | {"min_p": 3}, "min_p"),
    (OK | {"repetition_penalty": 0}, "repetition_penalty"),
    (OK | {"seed": -1}, "seed"),
    (OK | {"seed": 2**65}, "seed"),
    (OK | {"stop": [""]}, "stop"),
    (OK | {"stop": 7}, "stop"),
    (OK | {"n": 2}, "n:"),
    (OK | {"echo": True}, "echo"),
    (OK | {"best_of": 3}, "best_of"),
    (OK | {"logprobs": 21}, "logprobs"),
    (OK | {"logprobs": True}, "logprobs"),
    (OK | {"stream": "yes"}, "stream"),
    (OK | {"stream_options": {"include_usage": True}}, "stream_options"),
    (OK | {"stream": True, "stream_options": {"x": 1}}, "x"),
    (OK | {"timeout": 0}, "timeout"),
    (OK | {"frequency_penalty": 1.0}, "frequency_penalty"),
    (OK | {"prompt_cache": 1}, "prompt_cache"),
    (CHAT | {"messages": []}, ""),
    (CHAT | {"messages": "x"}, "messages"),
    (CHAT | {"messages": [{"role": "user"}]}, "content"),
    (CHAT | {"messages": [{"content": "x"}]}, "role"),
    (CHAT | {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "text"),
    (CHAT | {"tools": [{"type": "function"}]}, "tools"),
    (CHAT | {"logprobs": 1}, "logprobs"),
    (CHAT | {"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
    (CHAT | {"top_logprobs": 2}, "top_logprobs needs logprobs"),
    (CHAT | {"response_format": {"type": "json_object"}}, "response_format"),
]
RAW = [b"", b"{", b"\xff\xfe", b"[" * 5000, b'{"prompt": "\\ud800"}', b'{"prompt": NaN}', b"nul"]
RAW += [b'{"prompt": "x", "\\ud800": 1}', b'{"prompt": "x", "model": "\\ud800"}']
RAW += [b'{"prompt": "x", "temperature": 1e999}']
PATHS = [
    f"{start}/{up * 12}etc/passwd"
    for start in ("", "/v1", "/v1/models", "/assets", "/v2/models")
    for up in ("../", "%2e%2e/", "..%2f", "..%5c")
]
PATHS += ["//etc/passwd", "/v1/models/%2fetc%2fpasswd", "/assets/%00", "/config.json"]


def test_what_cannot_be_answered_is_told_in_openais_shape(server: Server) -> None:
    with httpx.Client(base_url=server.url, timeout=30) as client:
        for body, told in BAD:
            path = (
                "chat/completions"
                if isinstance(body, dict) and "messages" in body
                else "completions"
            )
            answer = client.post(f"/v1/{path}", json=body)
            if told or answer.status_code != 200:
                assert answer.status_code == 400, (body, answer.text)
                assert told in answer.json()["error"]["message"], (body, answer.text)
                assert answer.json()["error"]["type"] == "invalid_request_error"
                if isinstance(body, dict) and told in body:
                    assert answer.json()["error"]["param"].startswith(told), (body, answer.text)
        for raw in RAW:
            answer = client.post("/v1/completions", content=raw)
            assert answer.status_code == 400, (raw, answer.text)
            assert answer.json()["error"]["message"]
        for method, path, status in (
            ("GET", "/nothing", 404),
            ("GET", "/v1/completions", 405),
        ):
            answer = client.request(method, path)
            assert (answer.status_code, "error" in answer.json()) == (status, True)
        for path in PATHS:
            assert status_and_body(server.url, path) == (404, False), path
        assert client.post("/v1/completions", content=b"x" * 20001).status_code == 413
        answer = client.post("/v1/embeddings", json={"model": "tiny", "input": "x"})
        assert answer.status_code == 400
        assert "no embeddings" in answer.json()["error"]["message"]
        asked = client.post("/v1/completions", json=OK | {"model": "gpt-4"})
        assert (asked.status_code, asked.json()["error"]["code"]) == (404, "model_not_found")
    assert complete(server, "alive").choices[0].finish_reason == "length"


def status_and_body(url: str, path: str) -> tuple[int, bool]:
    """What a client gets that sends a path as it is, and whether it is a file of this host."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)
    connection.request("GET", path)
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, b"root:" in body or b"max_position_embeddings" in body


def test_a_request_that_the_model_has_no_numbers_for_fails_alone(
    model: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "tiny"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][ord_id("#")] = float("nan")
    tensors["lm_head.weight"][ord_id("#")] = 0  # Nobody else comes upon it.
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with Server.start(folder, "-pp", "2") as server, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda n: asked(server, "#" if n == 3 else f"{n}", 50), range(8)))
        assert [a.status_code for a in answers] == [500 if n == 3 else 200 for n in range(8)]
        assert "logits are not finite" in answers[3].json()["error"]["message"]
        assert num_ended(server, "error") == 1
        assert server.metric("kv_cache_usage_perc") == 0


def test_a_full_queue_refuses_the_rest(model: Path) -> None:
    small = ["--set", "scheduler.max_num_seqs=1", "--set", "scheduler.max_queue_size=2"]
    with Server.start(model, *small) as server:
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda n: asked(server, f"{n}", 150), range(8)))
        codes = [answer.status_code for answer in answers]
        assert sorted(codes) == [200] * 3 + [429] * 5
        assert all(a.headers["retry-after"] == "1" for a in answers if a.status_code == 429)
        assert [num_ended(server, reason) for reason in ("length", "refused")] == [3, 5]
        # One waits for nobody, one for the first, one for two: half of what all of them took.
        assert server.metric("request_queue_time_seconds_count") == 3
        waited = server.metric("request_queue_time_seconds_sum")
        assert 0.3 < waited / server.metric("e2e_request_latency_seconds_sum") < 0.6
        for n, answer in enumerate(answers):
            if answer.status_code == 200:
                assert answer.json()["choices"] == asked(server, f"{n}", 150).json()["choices"]


def asked(server: Server, prompt: str, max_tokens: int) -> httpx.Response:
    body = {"prompt": prompt, "max_tokens": max_tokens}
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)


def test_sigterm_lets_streams_end_and_takes_no_more(model: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("secret\n")
    key = ["--set", f"server.api_key_file={tmp_path / 'key'}"]
    with Server.start(model, *key) as server:
        with pytest.raises(openai.AuthenticationError):
            server.client(key="wrong").models.list()
        client = server.client(key="secret")
        assert [card.id for card in client.models.list()] == ["tiny"]
        health = run_command("health", "--url", server.url)
        assert (health.returncode, health.stdout) == (0, '{"status":"ready"}\n')
        streams = [
            client.completions.create(model="tiny", prompt=f"{n}", max_tokens=600, stream=True)
            for n in range(3)
        ]
        firsts = [next(iter(stream)) for stream in streams]
        server.terminate()
        wait_for(lambda: httpx.get(f"{server.url}/health/ready").status_code == 503, seconds=10)
        with pytest.raises(openai.InternalServerError, match="draining"):
            client.completions.create(model="tiny", prompt="late", max_tokens=1)
        for first, stream in zip(firsts, streams, strict=True):
            rest = list(stream)
            assert rest[-1].choices[0].finish_reason == "length"
            assert first.choices[0].finish_reason is None
        assert server.process.wait(20) == 0, "".join(server.said)
        told = "told to end; open requests have 60 s to be answered"
        wait_for(lambda: told in "".join(server.said))
    assert run_command("health", "--url", server.url).returncode == 1


def test_a_second_sigterm_ends_at_once(model: Path) -> None:
    with Server.start(model) as server:
        stream = complete(server, "long", LONG, stream=True)
        next(iter(stream))
        server.terminate()
        time.sleep(0.3)
        server.terminate()
        assert server.process.wait(5) == -signal.SIGTERM


@pytest.mark.full
def test_a_rank_that_is_killed_ends_all_requests(model: Path) -> None:
    with Server.start(model, "-pp", "2") as server:
        streams = [complete(server, f"{n}", LONG, stream=True) for n in range(4)]
        for stream in streams:
            next(iter(stream))
        ranks = {pid: environment_of(pid) for pid in processes_naming(str(model))}
        ranks = {pid: values for pid, values in ranks.items() if b"RANK" in values}
        victim = next(pid for pid, values in ranks.items() if values[b"RANK"] == b"1")
        started = time.monotonic()
        os.kill(victim, signal.SIGKILL)
        for stream in streams:
            with pytest.raises((openai.APIError, httpx.RemoteProtocolError)):
                list(stream)
        assert server.process.wait(10) == 8, "".join(server.said)
        assert time.monotonic() - started < 10
        assert "rank 1 (stage 1" in "".join(server.said)
        assert not [pid for pid in ranks if Path(f"/proc/{pid}").exists()]


def environment_of(pid: int) -> dict[bytes, bytes]:
    lines = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return {name: value for name, _, value in (line.partition(b"=") for line in lines)}


def test_mistakes_are_found_before_there_are_ranks(model: Path) -> None:
    given = ["serve", "--model", str(model), "--device", "cpu", "--set"]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run_command(*given, f"server.port={port}")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert f"cannot listen at 127.0.0.1 port {port}" in done.stderr
    done = run_command(*given, "server.api_key_file=/no/such/file")
    assert (done.returncode, "server.api_key_file: cannot read" in done.stderr) == (2, True)
    done = run_command(*given[:-1], "--host", "")
    assert (done.returncode, done.stderr.count("\n"), "--host" in done.stderr) == (2, 1, True)
    done = run_command(*given[:-1], "--uds", "s", "--port", "0")
    assert (done.returncode, done.stderr.count("\n"), "--uds" in done.stderr) == (2, 1, True)
    done = run_command(*given, "server.prot=1")
    assert (done.returncode, "port" in done.stderr) == (2, True)
