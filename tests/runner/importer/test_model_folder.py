"""A model folder is written whole or not at all, and its weights in files of a bounded size."""

import json
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from parallel.checkpoint import INDEX_FILE, SINGLE_FILE
from parallel.errors import ConfigError, PreflightError
from runner.importer.model_folder import (
    check_target,
    plan_files,
    staged_folder,
    write_weights,
)


@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=30), max_bytes=st.integers(1, 60))
def test_plan_keeps_order_and_bounds_each_file(sizes, max_bytes):
    named = {f"w{i}": size for i, size in enumerate(sizes)}
    plan = plan_files(named, max_bytes)
    assert [name for names in plan for name in names] == list(named)
    totals = [sum(named[name] for name in names) for names in plan]
    assert all(
        total <= max_bytes or len(names) == 1 for total, names in zip(totals, plan, strict=True)
    )
    # No file could have taken the first weight of the next one.
    for total, following in zip(totals, plan[1:], strict=False):
        assert total + named[following[0]] > max_bytes


def test_index_names_the_file_of_each_weight(tmp_path):
    weights = {f"w{i}": torch.full((4,), float(i)) for i in range(5)}
    shapes = dict.fromkeys(weights, (4,))
    write_weights(tmp_path, shapes, weights.__getitem__, dtype="float32", max_bytes=32)
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == 80
    assert sorted(set(index["weight_map"].values())) == [
        f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)
    ]
    for name, filename in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / filename)[name], weights[name])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_file_is_what_safetensors_itself_writes(tmp_path, dtype):
    torch.manual_seed(0)
    # Neither names nor sizes are in order, and one weight is not contiguous.
    weights = {
        "b.weight": torch.randn(3, 5).T,
        "a.\N{GREEK SMALL LETTER ALPHA}": torch.randn(7),
        "c": torch.randn(2, 2, 2),
        "scalar": torch.randn(()),
    }
    weights = {name: weight.to(getattr(torch, dtype)) for name, weight in weights.items()}
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    write_weights(tmp_path, shapes, weights.__getitem__, dtype=dtype, max_bytes=1000)
    raw = (tmp_path / SINGLE_FILE).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    assert length % 8 == 0
    assert list(header) == ["__metadata__", *weights]
    save_file({n: w.contiguous() for n, w in weights.items()}, tmp_path / "theirs")
    ours, theirs = load_file(tmp_path / SINGLE_FILE), load_file(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert weight.dtype == theirs[name].dtype
        assert torch.equal(weight, theirs[name]), name
    with safe_open(tmp_path / SINGLE_FILE, framework="pt") as handle:
        assert handle.metadata() == {"format": "pt"}


def test_each_weight_is_on_the_disk_and_let_go_before_the_next_is_read(tmp_path):
    alive: list[weakref.ref[torch.Tensor]] = []

    def read(_):
        # Only the file object's own buffer, smaller than a weight, may still be in memory.
        assert all(weight() is None for weight in alive)
        written = sum(path.stat().st_size for path in tmp_path.iterdir())
        assert written >= len(alive) * 400_000
        weight = torch.zeros(100_000)
        alive.append(weakref.ref(weight))
        return weight

    shapes = {f"w{i}": (100_000,) for i in range(5)}
    write_weights(tmp_path, shapes, read, dtype="float32", max_bytes=10**9)
    assert len(alive) == 5


@pytest.mark.parametrize("wrong", [torch.zeros(5), torch.zeros(4).half()], ids=["shape", "dtype"])
def test_a_weight_that_contradicts_the_header_is_not_written(tmp_path, wrong):
    with pytest.raises(AssertionError, match="w1"):
        write_weights(tmp_path, {"w1": (4,)}, lambda _: wrong, dtype="float32", max_bytes=99)


def test_weights_have_the_mode_of_other_files(tmp_path):
    with staged_folder(tmp_path / "out", num_bytes=1) as folder:
        write_weights(folder, {"w": (1,)}, lambda _: torch.zeros(1), dtype="float32", max_bytes=9)
        (folder / "other").write_text("")
    mode = (tmp_path / "out" / "other").stat().st_mode
    assert (tmp_path / "out" / SINGLE_FILE).stat().st_mode == mode
    assert not (tmp_path / "out" / INDEX_FILE).exists()


def test_a_failure_leaves_nothing(tmp_path):
    def half_written(out):
        with staged_folder(out, num_bytes=1) as folder:
            (folder / "config.json").write_text("{}")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        half_written(tmp_path / "deep" / "out")
    assert list((tmp_path / "deep").iterdir()) == []


def test_an_old_folder_stays_when_its_replacement_fails(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("old")
    with pytest.raises(PreflightError, match="cannot write"), staged_folder(out, num_bytes=1):
        raise OSError(28, "No space left on device")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "config.json").read_text() == "old"


def test_an_old_folder_is_replaced_whole(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("old")
    (out / "stale.safetensors").write_text("old")
    with staged_folder(out, num_bytes=1) as folder:
        (folder / "config.json").write_text("new")
    assert [path.name for path in out.iterdir()] == ["config.json"]
    assert (out / "config.json").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_is_found_out_first(tmp_path):
    with (
        pytest.raises(PreflightError, match="GB free"),
        staged_folder(tmp_path / "out", num_bytes=2**62),
    ):
        pytest.fail("the body must not run")
    assert list(tmp_path.iterdir()) == []


def test_targets_that_would_lose_something_are_refused(tmp_path):
    source = tmp_path / "model.gguf"
    source.write_text("")
    out = tmp_path / "out"
    check_target(out, source=source, overwrite=False)
    out.mkdir()
    check_target(out, source=source, overwrite=False)
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="use --overwrite"):
        check_target(out, source=source, overwrite=False)
    with pytest.raises(ConfigError, match=r"no config\.json"):
        check_target(out, source=source, overwrite=True)
    (out / "config.json").write_text("{}")
    check_target(out, source=source, overwrite=True)
    with pytest.raises(ConfigError, match="is a file"):
        check_target(source, source=source, overwrite=True)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds"):
        check_target(tmp_path, source=source, overwrite=True)
