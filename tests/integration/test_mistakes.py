"""Every mistake a user can make gets one clear line, the right exit code, and leaves no process."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints import add_tokenizer, make_checkpoint
from processes import processes_naming, run_command

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two shards with a tokenizer."""
    folder = tmp_path_factory.mktemp("original")
    make_checkpoint("llama", folder, vocab_size=300, num_hidden_layers=4)
    add_tokenizer(folder)
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"part-1.safetensors": names[::2], "part-2.safetensors": names[1::2]}
    for file, held in parts.items():
        save_file({name: tensors[name] for name in held}, folder / file)
    weight_map = {name: file for file, held in parts.items() for name in held}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.fixture
def model(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "model"))


def plan_file(model: Path, stages: str) -> Path:
    file = model / "plan.yaml"
    file.write_text(
        f"version: 1\nmodel:\n  path: {model}\nparallel:\n  device: cpu\n  stages:\n{stages}"
    )
    return file


def _unknown_key(model: Path) -> list[str]:
    file = plan_file(model, "    - {tensor_paralel_size: 2}\n")
    return ["--config", str(file)]


def _wrong_type(model: Path) -> list[str]:
    file = plan_file(model, "    - {tensor_parallel_size: two}\n")
    return ["--config", str(file)]


def _more_ranks_than_heads(model: Path) -> list[str]:
    return ["--model", str(model), "-tp", "7"]


def _module_twice(model: Path) -> list[str]:
    stages = (
        '    - {modules: ["model.embed_tokens", "model.layers.{0..2}"]}\n'
        '    - {modules: ["model.layers.{2..3}", "model.norm", "lm_head"]}\n'
    )
    return ["--config", str(plan_file(model, stages))]


def _module_left_out(model: Path) -> list[str]:
    stages = (
        '    - {modules: ["model.embed_tokens", "model.layers.{0..1}"]}\n'
        '    - {modules: ["model.layers.3", "model.norm", "lm_head"]}\n'
    )
    return ["--config", str(plan_file(model, stages))]


def _absent_shard(model: Path) -> list[str]:
    (model / "part-2.safetensors").unlink()
    return ["--model", str(model), "-tp", "2"]


def _truncated_shard(model: Path) -> list[str]:
    shard = model / "part-1.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    return ["--model", str(model), "-tp", "2"]


def _wrong_shape(model: Path) -> list[str]:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    return ["--model", str(model), "-tp", "2"]


def _missing_tokenizer(model: Path) -> list[str]:
    (model / "tokenizer.json").unlink()
    return ["--model", str(model), "-tp", "2"]


def _long_prompt(model: Path) -> list[str]:
    return ["--model", str(model), "-tp", "2", "--max-model-len", "4"]


def _unknown_architecture(model: Path) -> list[str]:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"architectures": ["BertModel"]}))
    return ["--model", str(model)]


def _absent_model(model: Path) -> list[str]:
    return ["--model", str(model / "nowhere")]


def _bad_temperature(model: Path) -> list[str]:
    return ["--model", str(model), "--temperature", "-1"]


@pytest.mark.parametrize(
    ("spoil", "exit_code", "words"),
    [
        (_unknown_key, 2, ["plan.yaml:7:8", "tensor_paralel_size", "did you mean"]),
        (_wrong_type, 2, ["plan.yaml:7", "tensor_parallel_size", "'two'"]),
        (_more_ranks_than_heads, 2, ["tensor_parallel_size=7", "num_attention_heads=6", "1 to 6"]),
        (_module_twice, 2, ["model.layers.2", "stage 0", "stage 1"]),
        (_module_left_out, 2, ["model.layers.2", "no stage"]),
        (_absent_shard, 4, ["part-2.safetensors", "absent"]),
        (_truncated_shard, 4, ["part-1.safetensors", "truncated"]),
        (_wrong_shape, 4, ["mlp", "shape", "97", "96"]),
        (_missing_tokenizer, 4, ["tokenizer.json"]),
        (_long_prompt, 2, ["5 tokens", "max_model_len=4"]),
        (_unknown_architecture, 2, ["BertModel", "LlamaForCausalLM"]),
        (_absent_model, 2, ["nowhere", "no directory"]),
        (_bad_temperature, 2, ["temperature=-1", "0 (greedy), or 1e-5 to 1e5"]),
    ],
    ids=lambda value: value.__name__.strip("_") if callable(value) else "",
)
def test_one_clear_line(
    model: Path, spoil: Callable[[Path], list[str]], exit_code: int, words: list[str]
) -> None:
    arguments = ["generate", "--prompt", "Hello", "--device", "cpu", *spoil(model)]
    if "--config" in arguments:
        arguments = [a for a in arguments if a not in ("--device", "cpu")]
    done = run_command(*arguments)
    assert done.returncode == exit_code, done.stderr
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert [word for word in words if word not in done.stderr] == [], done.stderr
    assert processes_naming(str(model)) == []
