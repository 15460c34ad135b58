"""`shardline generate` as a user runs it: JSON lines, streamed text, sampling, chat, cuts."""

import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from checkpoints import add_tokenizer, load_reference, make_checkpoint, reference_greedy
from processes import run_command, start_command
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from runner.cli.app import app
from runner.text.tokenizer import Tokenizer

KEYS = ["prompt", "text", "token_ids", "finish_reason", "prompt_tokens", "completion_tokens"]
PROMPTS = ["One two", "drei: é🙂"]
NUM_TOKENS = 16
CHAT = "{% for m in messages %}<s>[{{ m.role }}] {{ m.content }}{% endfor %}</s>"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model that says nothing of sampling and never ends by itself."""
    folder = tmp_path_factory.mktemp("generate") / "model"
    make_checkpoint(
        "llama",
        folder,
        vocab_size=259,
        max_position_embeddings=5000,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        eos_token_id=None,
    )
    (folder / "chat_template.jinja").write_text(CHAT)
    return add_tokenizer(folder)


@pytest.fixture(scope="module")
def sampling_model(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with defaults for sampling."""
    folder = Path(shutil.copytree(model, tmp_path_factory.mktemp("sampling") / "model"))
    values = {"do_sample": True, "temperature": 1.5, "top_k": 200}
    (folder / "generation_config.json").write_text(json.dumps(values))
    return folder


@pytest.fixture(scope="module")
def greedy(model: Path) -> list[dict[str, Any]]:
    """What transformers makes of the prompts, in the form of our JSON."""
    tokenizer, reference = Tokenizer.load(model), load_reference(model)
    completions = []
    for prompt in PROMPTS:
        prompt_ids = tokenizer.encode(prompt)
        ids = reference_greedy(reference, prompt_ids, NUM_TOKENS)
        text, counts = tokenizer.decode(ids), (len(prompt_ids), len(ids))
        values = (prompt, text, ids, "length", *counts)
        completions.append(dict(zip(KEYS, values, strict=True)))
    return completions


def arguments(model: Path, *more: str, prompts: list[str] = PROMPTS) -> list[str]:
    asked = [part for prompt in prompts for part in ("--prompt", prompt)]
    common = ["--device", "cpu", "--model", str(model), "--max-tokens", str(NUM_TOKENS)]
    return ["generate", *common, *asked, *more]


def generate(model: Path, *more: str) -> list[dict[str, Any]]:
    """The objects that --json prints."""
    done = run_command(*arguments(model, "--json", *more))
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def generate_here(model: Path, *more: str, prompts: list[str] = PROMPTS) -> list[dict[str, Any]]:
    """The same on one rank, within this process: it need not import torch first."""
    done = CliRunner().invoke(app, arguments(model, "--json", *more, prompts=prompts))
    assert done.exception is None, done.exception
    return [json.loads(line) for line in done.stdout.splitlines()]


def plan_file(folder: Path, stages: str) -> str:
    file = folder / "plan.yaml"
    file.write_text(f"version: 1\nmodel: {{path: /nowhere}}\nparallel: {{stages: {stages}}}\n")
    return str(file)


def test_json_is_an_object_a_line_in_the_order_of_the_prompts(
    model: Path, greedy: list[dict[str, Any]]
) -> None:
    objects = generate(model)
    assert [list(completion) for completion in objects] == [KEYS] * 2
    assert objects == greedy


@pytest.mark.dist
@pytest.mark.parametrize(
    "cut",
    [
        ("-tp", "2"),
        ("-pp", "2", "--set", "scheduler.max_num_batched_tokens=5"),
    ],
    ids=" ".join,
)
def test_the_cut_changes_nothing(
    cut: tuple[str, ...], model: Path, greedy: list[dict[str, Any]]
) -> None:
    assert generate(model, *cut) == greedy


@pytest.mark.dist
def test_a_plan_file_and_flags_over_it(
    model: Path, greedy: list[dict[str, Any]], tmp_path: Path
) -> None:
    stages = (
        "[{modules: [model.embed_tokens, model.layers.0]},"
        " {modules: ['model.layers.{1..2}', model.norm, lm_head]}]"
    )
    assert generate(model, "--config", plan_file(tmp_path, stages)) == greedy


def test_a_stop_string_ends_one_completion_before_the_other(
    model: Path, greedy: list[dict[str, Any]]
) -> None:
    first, second = (completion["text"] for completion in greedy)
    stop = next(second[i : i + 2] for i in range(3, 9) if second[i : i + 2] not in first)
    one, other = generate(model, "--stop", "never", "--stop", stop)
    assert one == greedy[0]
    assert (other["prompt"], other["finish_reason"]) == (PROMPTS[1], "stop")
    assert other["text"] == second[: second.index(stop)]
    count = other["completion_tokens"]
    assert 0 < count < NUM_TOKENS
    assert other["token_ids"] == greedy[1]["token_ids"][:count]


@pytest.mark.dist
def test_text_of_several_prompts_has_a_heading_each(
    model: Path, greedy: list[dict[str, Any]]
) -> None:
    """Also where there is no text, because a stop string came first."""
    first, second = (completion["text"] for completion in greedy)
    stop = first[0]
    done = run_command(*arguments(model, "--stop", stop, "-tp", "2"))
    assert done.returncode == 0, done.stderr
    cut = second.split(stop)[0]
    assert done.stdout == f"[0] {PROMPTS[0]!r}\n\n[1] {PROMPTS[1]!r}\n{cut}\n"
    lines = done.stderr.splitlines()
    sizes = "float32, 2 ranks, tensor-parallel sizes [2]"
    assert lines[0] == f"shardline: eager (not compiled), {sizes}"
    assert len(lines) == 2
    assert lines[1].endswith("tokens/s after the first token")


def test_text_streams(model: Path, greedy: list[dict[str, Any]]) -> None:
    """It arrives in many pieces, the first of them long before the end."""
    job = start_command(*arguments(model, "--max-tokens", "600", prompts=PROMPTS[:1]))
    assert job.stdout is not None
    pieces, first_at = [], None
    while piece := os.read(job.stdout.fileno(), 65536):
        first_at = first_at or time.monotonic()
        pieces.append(piece)
    assert first_at is not None
    streamed_s = time.monotonic() - first_at
    _, errors = job.communicate()
    assert job.returncode == 0, errors
    assert "eager (not compiled), float32, 1 rank," in errors
    assert len(pieces) > 20
    assert streamed_s > 0.1
    assert (
        b"".join(pieces).decode().startswith(greedy[0]["text"].rstrip("\N{REPLACEMENT CHARACTER}"))
    )


def test_chat_is_the_template_around_the_prompt(model: Path) -> None:
    (chat,) = generate_here(model, "--chat", prompts=["Hi"])
    (plain,) = generate_here(model, prompts=["<s>[user] Hi</s>"])
    assert chat["prompt"] == "Hi"
    assert chat["prompt_tokens"] == plain["prompt_tokens"] == 2 + len("[user] Hi")
    assert chat["token_ids"] == plain["token_ids"]


def ids(objects: list[dict[str, Any]]) -> list[list[int]]:
    return [completion["token_ids"] for completion in objects]


def test_sampling_is_the_folders_default_and_without_a_seed_never_the_same(
    sampling_model: Path, greedy: list[dict[str, Any]]
) -> None:
    runs = [ids(generate_here(sampling_model)) for _ in range(2)]
    assert runs[0] != runs[1]
    assert ids(greedy) not in runs


@pytest.mark.full
@pytest.mark.dist
def test_a_seed_gives_the_same_tokens_at_every_cut(sampling_model: Path) -> None:
    one = generate_here(sampling_model, "--seed", "5")
    assert one == generate_here(sampling_model, "--seed", "5")
    assert one == generate(sampling_model, "--seed", "5", "-tp", "2")
    assert one != generate_here(sampling_model, "--seed", "6")


@pytest.mark.parametrize("flags", [("--temperature", "0"), ("--top-k", "1"), ("--top-p", "1e-9")])
def test_flags_go_before_the_folders_defaults(
    flags: tuple[str, ...], sampling_model: Path, greedy: list[dict[str, Any]]
) -> None:
    assert ids(generate_here(sampling_model, *flags)) == ids(greedy)


def test_a_temperature_is_enough_to_sample(model: Path, greedy: list[dict[str, Any]]) -> None:
    assert ids(generate_here(model, "--temperature", "3")) != ids(greedy)


def test_repetition_penalty_holds_for_greedy_too(model: Path) -> None:
    """A penalty this strong lets no token come twice."""
    for completion in generate_here(model, "--repetition-penalty", "1e9"):
        assert len(set(completion["token_ids"])) == NUM_TOKENS


def test_one_sequence_at_a_time_in_blocks_of_one_token(
    model: Path, greedy: list[dict[str, Any]]
) -> None:
    sizes = ("scheduler.max_num_seqs=1", "kv_cache.block_size=1")
    assert generate_here(model, *(part for size in sizes for part in ("--set", size))) == greedy


def test_another_runner_in_the_working_directory_is_not_run(
    model: Path, tmp_path: Path, greedy: list[dict[str, Any]]
) -> None:
    (tmp_path / "runner.py").write_text("print('an impostor')")
    command = [str(Path(sys.executable).with_name("shardline"))]
    done = run_command(*arguments(model, "-tp", "2", "--json"), launcher=command, cwd=tmp_path)
    assert [json.loads(line) for line in done.stdout.splitlines()] == greedy


def test_logits_that_are_no_numbers_end_the_job(model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    done = run_command(*arguments(folder, "-tp", "2"))
    assert done.returncode == 2
    assert done.stdout == ""
    assert "the model's logits are not finite" in done.stderr


def test_without_max_tokens_a_completion_ends_by_default(model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    common = ["generate", "--device", "cpu", "--model", str(folder), "--json", "--prompt", "a"]
    assert json.loads(run_command(*common).stdout)["completion_tokens"] == 256
    (folder / "generation_config.json").write_text('{"max_new_tokens": 7}')
    assert json.loads(run_command(*common).stdout)["completion_tokens"] == 7


def test_help_answers_at_once() -> None:
    def seconds() -> float:
        started = time.monotonic()
        assert run_command("--help").returncode == 0
        return time.monotonic() - started

    assert min(seconds() for _ in range(5)) < 0.3
