"""A model folder opened: lengths that can be asked for, and folders that cannot be used."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from parallel.errors import ConfigError, IntegrityError
from runner.models.spec import ModelSpec


@pytest.fixture
def folder(checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """A Llama that a test may spoil."""
    return Path(shutil.copytree(checkpoint("llama"), tmp_path / "model"))


def test_length_is_the_models_own_or_less(folder: Path) -> None:
    spec = ModelSpec.open(folder)
    assert spec.max_model_len(None) == 128
    assert spec.max_model_len(128) == 128
    assert spec.max_model_len(1) == 1


def test_length_beyond_the_models_own_is_refused(folder: Path) -> None:
    line = "max_model_len=129 exceeds the 128 tokens this model is made for; use 1 to 128"
    with pytest.raises(ConfigError, match=line):
        ModelSpec.open(folder).max_model_len(129)


def test_a_scaled_rope_lengthens_the_model(checkpoint: Callable[[str], Path]) -> None:
    assert ModelSpec.open(checkpoint("llama_bias_tied_linear")).max_model_len(None) == 320


def test_the_head_may_be_left_in_a_tied_checkpoint(folder: Path) -> None:
    """transformers 4 did save it; it is not read."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    spec = ModelSpec.open(folder)
    assert spec.config.tied
    assert "lm_head.weight" in spec.checkpoint.tensors
    assert "lm_head.weight" in spec.layout.ignored


def test_dtype_is_that_of_most_bytes_where_the_config_does_not_say(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert ModelSpec.open(folder).dtype == config["dtype"] == "float32"
    (folder / "config.json").write_text(json.dumps(config | {"dtype": None}))
    assert ModelSpec.open(folder).dtype == "float32"
    file = folder / "model.safetensors"
    tensors = load_file(file)
    halves = {n: t.bfloat16() if t.dim() == 2 else t for n, t in tensors.items()}
    save_file(halves, file)
    assert ModelSpec.open(folder).dtype == "bfloat16"
    save_file({name: tensor.char() for name, tensor in tensors.items()}, file)
    with pytest.raises(IntegrityError, match="holds no tensor of F32, F16, BF16"):
        _ = ModelSpec.open(folder).dtype


def test_names_of_a_base_model_are_completed(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    whole = ModelSpec.open(checkpoint("gpt2"))
    shutil.copytree(checkpoint("gpt2"), tmp_path, dirs_exist_ok=True)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file({name.removeprefix("transformer."): t for name, t in tensors.items()}, file)
    base = ModelSpec.open(tmp_path)
    assert set(base.checkpoint.tensors) == set(whole.checkpoint.tensors)
    assert base.checkpoint.stored_name("transformer.wte.weight") == "wte.weight"


@pytest.mark.parametrize("absent", ["config.json", "model.safetensors"])
def test_an_absent_file_is_named(folder: Path, absent: str) -> None:
    (folder / absent).unlink()
    with pytest.raises(IntegrityError, match=absent):
        ModelSpec.open(folder)
