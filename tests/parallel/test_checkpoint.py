"""A safetensors folder, whole and damaged in every way that a copy can go wrong."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from parallel.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint
from parallel.errors import IntegrityError

SHARDS = {
    "model-00001-of-00002.safetensors": {"a": torch.ones(2, 3), "b": torch.ones(4)},
    "model-00002-of-00002.safetensors": {"c": torch.ones(5, 1, dtype=torch.bfloat16)},
}
FIRST, SECOND = SHARDS


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A checkpoint of two files and an index."""
    for file, tensors in SHARDS.items():
        save_file(tensors, tmp_path / file)
    write_index(tmp_path, {name: file for file, tensors in SHARDS.items() for name in tensors})
    return tmp_path


@pytest.fixture
def single(tmp_path: Path) -> Path:
    """A checkpoint of one file without an index."""
    save_file(SHARDS[FIRST], tmp_path / SINGLE_FILE)
    return tmp_path


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def refusal(folder: Path) -> str:
    """The message of the one error that a damaged checkpoint may raise."""
    with pytest.raises(IntegrityError) as caught:
        Checkpoint.open(folder)
    return str(caught.value)


def test_shards_are_read_through_the_index(sharded: Path) -> None:
    tensors = Checkpoint.open(sharded).tensors
    assert {name: (info.file.name, info.dtype, info.shape) for name, info in tensors.items()} == {
        "a": (FIRST, "F32", (2, 3)),
        "b": (FIRST, "F32", (4,)),
        "c": (SECOND, "BF16", (5, 1)),
    }


def test_a_single_file_needs_no_index(single: Path) -> None:
    tensors = Checkpoint.open(single).tensors
    assert {name: info.file for name, info in tensors.items()} == {
        "a": single / SINGLE_FILE,
        "b": single / SINGLE_FILE,
    }


def test_files_that_the_index_does_not_name_are_not_read(sharded: Path) -> None:
    (sharded / "optimizer.safetensors").write_bytes(b"not a checkpoint")
    (sharded / SINGLE_FILE).write_bytes(b"nor this")
    assert set(Checkpoint.open(sharded).tensors) == {"a", "b", "c"}


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    expected = (
        f"{tmp_path}: holds neither {INDEX_FILE} nor {SINGLE_FILE}; give a folder with "
        "safetensors weights"
    )
    assert refusal(tmp_path) == expected


def test_an_index_that_names_an_absent_shard(sharded: Path) -> None:
    (sharded / SECOND).unlink()
    assert refusal(sharded) == (
        f"{sharded / SECOND}: absent, though {INDEX_FILE} places c in it; copy it again"
    )


def test_an_index_that_promises_a_tensor_its_file_lacks(sharded: Path) -> None:
    write_index(sharded, {"a": FIRST, "b": FIRST, "c": SECOND, "d": SECOND})
    assert refusal(sharded) == (
        f"{sharded / SECOND}: tensor d is missing, though {INDEX_FILE} places it here"
    )


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b'{"weight_map": {"a": "model-000',
        b"[]",
        b"{}",
        b'{"weight_map": ["a"]}',
        b"\xff\xfe\x00",
    ],
    ids=["empty", "cut off", "a list", "no weight_map", "weight_map is a list", "not text"],
)
def test_an_index_that_is_none(sharded: Path, text: bytes) -> None:
    (sharded / INDEX_FILE).write_bytes(text)
    expected = f"{sharded / INDEX_FILE}: not a safetensors index; copy it again"
    assert refusal(sharded) == expected


def test_a_directory_in_the_place_of_the_index(sharded: Path) -> None:
    (sharded / INDEX_FILE).unlink()
    (sharded / INDEX_FILE).mkdir()
    assert "cannot be read" in refusal(sharded)


def test_a_cut_shard_is_told_by_what_it_should_hold(sharded: Path) -> None:
    (sharded / FIRST).write_bytes((sharded / FIRST).read_bytes()[:-1])
    assert "; a and 1 more tensors are in it; copy it again" in refusal(sharded)


def test_an_index_that_names_nothing(sharded: Path) -> None:
    write_index(sharded, {})
    assert str(sharded / INDEX_FILE) in refusal(sharded)


def test_the_index_says_which_of_two_files_is_read(sharded: Path) -> None:
    """The second shard holds an `a` of its own, left over from another model."""
    save_file({"a": torch.ones(7), **SHARDS[SECOND]}, sharded / SECOND)
    assert Checkpoint.open(sharded).tensors["a"].file == sharded / FIRST


def test_a_shard_cut_anywhere_is_refused(single: Path) -> None:
    """In the length of the header, in the header, and in the data down to its last byte."""
    file = single / SINGLE_FILE
    whole = file.read_bytes()
    header_end = 8 + int.from_bytes(whole[:8], "little")
    for length in (0, 4, 8, header_end // 2, header_end, header_end + 7, len(whole) - 1):
        file.write_bytes(whole[:length])
        message = refusal(single)
        assert message.startswith(f"{file}: truncated or corrupt (")
        assert message.endswith(f"); {length} bytes on disk; copy it again")
    file.write_bytes(whole)
    assert set(Checkpoint.open(single).tensors) == {"a", "b"}


@pytest.mark.parametrize(
    "content",
    [b"\0" * 64, b"version https://git-lfs.github.com/spec/v1\n", b"<!DOCTYPE html>" * 20],
    ids=["zeros", "a git-lfs pointer", "a web page"],
)
def test_a_file_that_is_no_safetensors_file(sharded: Path, content: bytes) -> None:
    (sharded / SECOND).write_bytes(content)
    assert refusal(sharded).startswith(f"{sharded / SECOND}: truncated or corrupt (")


def test_a_shard_longer_than_its_header_says(single: Path) -> None:
    with (single / SINGLE_FILE).open("ab") as file:
        file.write(b"\0")
    assert "truncated or corrupt" in refusal(single)


def test_a_base_models_names_get_the_whole_models_prefix(single: Path) -> None:
    """A checkpoint saved from LlamaModel rather than from LlamaForCausalLM lacks "model."."""
    base = Checkpoint.open(single).with_prefix("model.")
    assert set(base.tensors) == {"model.a", "model.b"}
    assert base.stored_name("model.a") == "a"


def test_names_that_have_the_prefix_stay(tmp_path: Path) -> None:
    tensors = {"model.norm.weight": torch.ones(2), "lm_head.weight": torch.ones(2)}
    save_file(tensors, tmp_path / SINGLE_FILE)
    whole = Checkpoint.open(tmp_path).with_prefix("model.")
    assert set(whole.tensors) == set(tensors)
    assert [whole.stored_name(name) for name in tensors] == list(tensors)
