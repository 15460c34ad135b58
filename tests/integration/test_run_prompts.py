"""`shardline run` over prompts: as `generate` at every cut, killed and run again, disk full."""

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import build_jobs
import pytest
from checkpoints import add_tokenizer, make_checkpoint
from processes import (
    COMMAND,
    ROOT,
    processes_naming,
    rank_pid,
    run_command,
    start_command,
    wait_until_gone,
)
from typer.testing import CliRunner, Result

from runner.cli.app import app

NUM_LINES = 120
NUM_TOKENS = 12
CHAT = "{% for m in messages %}<s>[{{ m.role }}] {{ m.content }}{% endfor %}</s>"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
GONE_WITHIN_S = 5.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model that never ends by itself."""
    folder = tmp_path_factory.mktemp("run_prompts") / "model"
    make_checkpoint("llama", folder, vocab_size=259, eos_token_id=None)
    (folder / "chat_template.jinja").write_text(CHAT)
    return add_tokenizer(folder)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Where prompts and answers lie; a test that fails must not spoil the next one."""
    yield tmp_path
    for pid in processes_naming(str(tmp_path)):
        os.kill(pid, signal.SIGKILL)


def write(folder: Path, *lines: dict[str, Any] | str, name: str = "in.jsonl") -> Path:
    path = folder / name
    encoded = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text("\n".join(encoded))
    return path


def arguments(model: Path, folder: Path, *more: str) -> list[str]:
    common = ["--device", "cpu", "--model", str(model), "--max-tokens", str(NUM_TOKENS)]
    return ["run", str(folder / "in.jsonl"), *common, "--output", str(folder / "out"), *more]


def results(folder: Path) -> list[dict[str, Any]]:
    """The whole lines of results."""
    path = folder / "out" / "results.jsonl"
    data = path.read_bytes() if path.exists() else b""
    return [json.loads(line) for line in data[: data.rfind(b"\n") + 1].splitlines()]


def errors(folder: Path) -> dict[int, str]:
    lines = (folder / "out" / "errors.jsonl").read_text().splitlines()
    return {line["index"]: line["error"] for line in map(json.loads, lines)}


def invoke(model: Path, folder: Path, *more: str) -> Result:
    """In this process, on one rank."""
    return CliRunner().invoke(app, arguments(model, folder, *more))


def batch_line(custom_id: str, url: str, **body: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


LINES = [
    {"id": "plain", "prompt": "One two"},
    {"prompt": "drei: é🙂", "max_tokens": 7},
    "",
    {"custom_id": "chat", "messages": [{"role": "user", "content": "Hi"}]},
    batch_line("b-chat", "/v1/chat/completions", messages=[{"role": "user", "content": "Hi"}]),
    batch_line("b-plain", "/v1/completions", prompt="One two", model="mine"),
]


@pytest.fixture(scope="module")
def generated(model: Path) -> list[dict[str, Any]]:
    """What `generate` makes of LINES."""

    def generate(*more: str) -> dict[str, Any]:
        asked = ["--device", "cpu", "--model", str(model), "--json", *more]
        done = CliRunner().invoke(app, ["generate", *asked])
        assert done.exception is None, done.exception
        values: dict[str, Any] = json.loads(done.stdout)
        return values

    tokens = ("--max-tokens", str(NUM_TOKENS))
    plain = generate("--prompt", "One two", *tokens)
    short = generate("--prompt", "drei: é🙂", "--max-tokens", "7")
    chat = generate("--prompt", "Hi", "--chat", *tokens)
    return [plain, short, chat, chat, plain]


def as_generated(result: dict[str, Any]) -> tuple[str, str, int, int]:
    """Text, reason and counts, of either form of a result."""
    body = result["response"]["body"] if "response" in result else result
    choice = body["choices"][0] if "choices" in body else body
    text = choice["message"]["content"] if "message" in choice else choice["text"]
    usage = body["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    return (
        *(text, choice["finish_reason"]),
        *(usage["prompt_tokens"], usage["completion_tokens"]),
    )


@pytest.mark.dist
@pytest.mark.parametrize(
    ("launcher", "cut"),
    [
        (COMMAND, ()),
        pytest.param(
            COMMAND,
            ("-tp", "2", "-pp", "2", "--set", "scheduler.max_num_seqs=2"),
            marks=pytest.mark.full,
        ),
        ([*TORCHRUN, "2", "-m", "runner"], ("-pp", "2")),
    ],
    ids=["one rank", "tp 2 pp 2", "torchrun"],
)
def test_an_answer_is_what_generate_says(
    launcher: list[str],
    cut: tuple[str, ...],
    model: Path,
    generated: list[dict[str, Any]],
    folder: Path,
) -> None:
    write(folder, *LINES)
    done = run_command(*arguments(model, folder, "--json", *cut), launcher=launcher)
    assert done.returncode == 0, done.stderr
    answers = results(folder)
    names = ("text", "finish_reason", "prompt_tokens", "completion_tokens")
    expected = [tuple(values[name] for name in names) for values in generated]
    assert [as_generated(answer) for answer in answers] == expected
    assert [answer.get("index") for answer in answers] == [1, 2, 4, None, None]
    assert [answer.get("id") for answer in answers[:3]] == ["plain", None, "chat"]
    assert [answer.get("custom_id") for answer in answers[3:]] == ["b-chat", "b-plain"]
    assert [answer["response"]["body"]["model"] for answer in answers[3:]] == ["model", "mine"]
    told = json.loads(done.stdout)
    counts = {name: told[name] for name in ("requests", "finished", "failed", "answers")}
    assert counts == {"requests": 5, "finished": 5, "failed": 0, "answers": 5}
    assert told["completion_tokens"] == sum(values[3] for values in expected)
    assert told["tokens_per_s"] > 0


def test_a_bundle_answers_as_its_model(
    model: Path, generated: list[dict[str, Any]], folder: Path
) -> None:
    """It holds the model's files, so its answers go into the same folder."""
    settings = {"compile.backend": "eager", "compile.buckets": [8], "model.max_model_len": 128}
    settings |= {"scheduler.max_num_seqs": 2, "scheduler.max_num_batched_tokens": 8}
    build_jobs.build_here(model, folder / "bundle", settings, no_run=True)
    path = write(folder, *LINES)
    common = [str(path), "--max-tokens", str(NUM_TOKENS), "--output", str(folder / "out")]
    bundle = ["--bundle", str(folder / "bundle"), "--accept-parity"]
    done = CliRunner().invoke(app, ["run", *common, *bundle])
    assert done.exception is None, done.exception
    answers = results(folder)
    assert [as_generated(answer)[0] for answer in answers] == [g["text"] for g in generated]
    assert answers[3]["response"]["body"]["model"] == "bundle"
    again = invoke(model, folder, "--json")
    assert json.loads(again.stdout)["answers"] == 0


def kill_at(folder: Path, command: list[str], count: int, *, rank: int | None) -> int:
    """Kill the launcher or a rank once there are so many answers: how many there are then."""
    job = start_command(*command)
    while len(results(folder)) < count:
        assert job.poll() is None, job.communicate()
        time.sleep(0.002)
    os.kill(job.pid if rank is None else rank_pid(str(folder), rank), signal.SIGKILL)
    job.communicate(timeout=60)
    assert wait_until_gone(str(folder), timeout_s=GONE_WITHIN_S) == []
    assert count <= len(results(folder)) < NUM_LINES
    return len(results(folder))


@pytest.mark.dist
def test_a_run_that_is_killed_goes_on_and_answers_each_line_once(model: Path, folder: Path) -> None:
    lines: list[dict[str, Any] | str] = [
        {"id": f"r{index}", "prompt": f"Say {index}", "max_tokens": 6 + 7 * index % 13}
        for index in range(NUM_LINES)
    ]
    lines[50] = "no JSON"
    write(folder, *lines)
    small = ("--set", "scheduler.max_num_seqs=4")
    command = arguments(model, folder, *small, "-pp", "2")

    num_first = kill_at(folder, command, 20, rank=None)
    first = results(folder)
    with (folder / "out" / "results.jsonl").open("a") as file:
        file.write('{"id": "r1", "file": "in.js')  # as a kill in the middle of a write leaves it
    num_second = kill_at(folder, command, num_first + 20, rank=0)
    assert results(folder)[:num_first] == first

    done = run_command(*command, "--json")
    assert done.returncode == 4, done.stderr
    assert f"1 line of {NUM_LINES} failed, see" in done.stderr
    told = json.loads(done.stdout)
    assert told["finished"] == NUM_LINES - 1
    assert told["answers"] == NUM_LINES - 1 - num_second
    answers = results(folder)
    assert [answer["index"] for answer in answers] == [*range(1, 51), *range(52, NUM_LINES + 1)]
    assert list(errors(folder)) == [51]

    (folder / "out").rename(folder / "killed")
    assert getattr(invoke(model, folder).exception, "exit_code", None) == 4
    assert results(folder) == answers

    again = invoke(model, folder, "--json")
    assert json.loads(again.stdout)["answers"] == 0
    assert results(folder) == answers


def test_a_full_disk_ends_the_run_and_a_later_one_goes_on(model: Path, folder: Path) -> None:
    """A limit on the size of files, in blocks of 1024 bytes, stands for the disk."""
    write(folder, *({"id": index, "prompt": "x"} for index in range(40)))
    limited = ["bash", "-c", 'ulimit -f 3; exec "$@"', "-", *COMMAND]
    failed = run_command(*arguments(model, folder), launcher=limited)
    assert failed.returncode == 3, failed.stderr
    last = failed.stderr.splitlines()[-1]
    assert last.startswith("shardline: cannot write")
    assert last.endswith("results.jsonl: File too large")
    before = results(folder)
    assert 5 < len(before) < 40
    assert (folder / "out" / "results.jsonl").read_text().endswith("\n")
    assert invoke(model, folder).exception is None
    assert results(folder)[: len(before)] == before
    assert [answer["id"] for answer in results(folder)] == list(range(40))


@pytest.mark.full
@pytest.mark.dist
def test_a_full_disk_ends_all_ranks(model: Path, folder: Path) -> None:
    write(folder, *({"id": index, "prompt": "x"} for index in range(40)))
    limited = ["bash", "-c", 'ulimit -f 3; exec "$@"', "-", *COMMAND]
    failed = run_command(*arguments(model, folder, "-tp", "2"), launcher=limited)
    assert failed.returncode == 3, failed.stderr
    assert failed.stderr.splitlines()[-1].endswith("results.jsonl: File too large")
    assert wait_until_gone(str(folder), timeout_s=GONE_WITHIN_S) == []


def test_bad_lines_are_named_and_do_not_stop_the_rest(model: Path, folder: Path) -> None:
    write(
        folder,
        {"prompt": "good", "id": 1},
        {"prompt": "x", "max_token": 1},
        {"prompt": "x" * 200},
        {"prompt": "x", "id": 1},
        {"prompt": "good", "stop": "never"},
    )
    done = invoke(model, folder)
    assert getattr(done.exception, "exit_code", None) == 4
    assert "3 lines of 5 failed, see" in str(done.exception)
    assert "in.jsonl, line 2: max_token: unknown key" in str(done.exception)
    assert done.stdout.startswith(f"2 answers in {folder / 'out'}, 3 bad lines; 2 prompts of 8")
    assert [answer["index"] for answer in results(folder)] == [1, 5]
    assert list(errors(folder)) == [2, 3, 4]


def test_answers_as_they_come(model: Path, folder: Path) -> None:
    """The first one is the longest, and everything runs at once."""
    write(folder, *({"id": index, "prompt": "x", "max_tokens": 9 - index} for index in range(5)))
    assert invoke(model, folder, "--order", "completed").exception is None
    assert [answer["id"] for answer in results(folder)] == [4, 3, 2, 1, 0]


def test_flags_of_sampling_are_for_lines_that_do_not_say(model: Path, folder: Path) -> None:
    write(folder, *({"prompt": "x", **more} for more in ({}, {}, {"seed": 2}, {"temperature": 0})))
    assert invoke(model, folder, "--temperature", "2", "--seed", "1").exception is None
    same, again, other, greedy = (answer["text"] for answer in results(folder))
    assert same == again
    assert len({same, other, greedy}) == 3


def test_a_folder_of_another_run_is_refused(model: Path, folder: Path) -> None:
    write(folder, {"prompt": "x"})
    assert invoke(model, folder).exception is None
    before = results(folder)
    for more, told in [
        (("--temperature", "1"), 'a run with options={"max_tokens": 12, "temperature": null'),
        (("--order", "completed"), 'of a run with order="input", this one has "completed"'),
        (("--dtype", "bfloat16"), 'of a run with dtype="float32", this one has "bfloat16"'),
    ]:
        failed = invoke(model, folder, *more)
        assert getattr(failed.exception, "exit_code", None) == 2
        assert told in str(failed.exception)
    write(folder, {"prompt": "y"})
    assert "of a run with inputs=" in str(invoke(model, folder).exception)
    assert results(folder) == before
    assert invoke(model, folder, "--overwrite").exception is None
    assert len(results(folder)) == 1
    assert results(folder) != before


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("absent.jsonl",), "cannot read absent.jsonl: No such file or directory; give a JSONL"),
        (("--temperature", "-1"), "temperature=-1.0 is not allowed"),
        (("--stop", ""), "a stop string is empty"),
        (("--format", "npy"), "--format is for tensor models, and LlamaForCausalLM is a language"),
        (("--output", "README.md/out"), "README.md/out cannot be written: "),
        (("--output", "docs"), "holds architecture.md and no run.json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_mistakes_are_found_before_there_are_ranks(
    more: tuple[str, ...], told: str, model: Path, folder: Path
) -> None:
    write(folder, {"prompt": "x"})
    done = run_command(*arguments(model, folder, "-tp", "2", *more))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert told in done.stderr
    assert not (folder / "out").exists()


def test_an_empty_input(model: Path, folder: Path) -> None:
    write(folder, "", " ")
    failed = invoke(model, folder)
    assert getattr(failed.exception, "exit_code", None) == 2
    assert "there are no prompts in" in str(failed.exception)


def test_a_terminal_has_a_bar(model: Path, folder: Path) -> None:
    write(folder, {"prompt": "x"}, {"prompt": "y"})
    ours, theirs = pty.openpty()
    job = subprocess.Popen([*COMMAND, *arguments(model, folder)], cwd=ROOT, stderr=theirs)
    os.close(theirs)
    data = b""
    with suppress(OSError):  # It says so that the other side is closed.
        while piece := os.read(ours, 65536):
            data += piece
    os.close(ours)
    assert job.wait(timeout=60) == 0
    shown = data.decode()
    assert "requests" in shown
    assert "2/2" in shown
    assert "tokens/s" in shown
