"""`bench --profile` as a user runs it: a trace a rank, with the names of what it did."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from dummy_model import make_dummy
from processes import run_command

SHORT = ("--input-len", "5", "--output-len", "4", "--max-rounds", "1")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dummy(tmp_path_factory.mktemp("profile-model"))


def bench(model: Path, *more: str) -> Any:
    common = ["--device", "cpu", "--model", str(model), "--load-format", "dummy", *SHORT, "--json"]
    return run_command("bench", "latency", *common, *more)


def ranges(file: Path) -> dict[str, list[tuple[float, float]]]:
    """Start and end of every range, by its name."""
    found: dict[str, list[tuple[float, float]]] = {}
    for event in json.loads(file.read_text())["traceEvents"]:
        if event.get("cat") == "user_annotation":
            span = event["ts"], event["ts"] + event["dur"]
            found.setdefault(event["name"], []).append(span)
    return found


def is_within(spans: list[tuple[float, float]], outer: list[tuple[float, float]]) -> bool:
    return all(any(o[0] <= s[0] and s[1] <= o[1] for o in outer) for s in spans)


@pytest.mark.dist
def test_a_trace_of_every_rank_names_what_it_did(model: Path, tmp_path: Path) -> None:
    """Three ranks: two share the first stage, the third is the second one."""
    folder = tmp_path / "new" / "traces"
    first = "{tensor_parallel_size: 2, modules: [model.embed_tokens, model.layers.0]}"
    second = "{tensor_parallel_size: 1, modules: [model.layers.1, model.norm, lm_head]}"
    cut = ["--set", f"parallel.stages=[{first}, {second}]"]
    done = bench(model, *cut, "--profile", str(folder), "--profile-steps=3")
    assert done.returncode == 0, done.stderr
    # One more round that does not count, and of it three of the four steps.
    result = json.loads(done.stdout)["result"]
    assert (result["warmup_rounds"], len(result["rounds_ms"])) == (2, 1)
    assert sorted(f.name for f in folder.iterdir()) == [f"rank{r}.json" for r in range(3)]
    for rank in range(3):
        found = ranges(folder / f"rank{rank}.json")
        stage = rank // 2
        step = found["step of requests 1"]
        assert len(step) == len(found[f"stage {stage}"]) == 3
        assert is_within(found[f"stage {stage}"], step)
        shared = ["layers.0.qkv", "layers.0.o_proj", "layers.0.add_mlp", "all_reduce", "send"]
        alone = ["layers.1.qkv", "layers.1.block", "head", "receive"]
        for name in shared if stage == 0 else alone:
            assert len(found[name]) >= 3, (rank, name)
            assert is_within(found[name], step), (rank, name)
        # Tokens of the third step are read after it.
        assert len(found["broadcast"]) >= 2
        assert not found.keys() & set(alone if stage == 0 else shared)

    told = done.stderr.splitlines()[-2:]
    assert str(folder / "rank2.json") in told[0]
    nsys = shlex.split(told[1].partition("Nsight Systems: ")[2])
    assert nsys[:2] == ["nsys", "profile"]
    assert nsys[nsys.index("shardline") + 1 :][:2] == ["bench", "latency"]
    assert "--profile" not in told[1]
    assert nsys[-2:] == ["--set", "observability.nvtx=true"]


@pytest.mark.full
def test_names_without_a_trace(model: Path) -> None:
    """What Nsight is started with runs on a CPU, too."""
    done = bench(model, "--set", "observability.nvtx=true")
    assert done.returncode == 0, done.stderr
    assert "traces" not in done.stderr
    assert json.loads(done.stdout)["result"]["warmup_rounds"] == 1


def test_a_folder_that_is_a_file(model: Path) -> None:
    done = bench(model, "--profile", str(model / "config.json"))
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "--profile" in done.stderr
