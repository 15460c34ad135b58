"""`shardline bench` as a user runs it: JSON, text, cuts, and mistakes that start no rank."""

import json
from pathlib import Path
from typing import Any

import pytest
from dummy_model import make_dummy
from processes import processes_naming, run_command

from runner.cli.bench_text import describe

SHORT = ("--input-len", "5", "--output-len", "4", "--max-rounds", "2")
REPORT = ["benchmark", "command", "environment", "model", "workload", "limits", "result"]
ENVIRONMENT = {
    *("shardline", "commit", "python", "torch", "cuda", "nccl", "tensorrt"),
    *("gpus", "driver", "cpu", "num_cpus", "num_threads"),
}
RATES = {"gb_per_s", "share_of_bandwidth", "tflop_per_s", "share_of_matmul_rate"}
PHASE = {"ms", "floor_ms", "share_of_floor"} | RATES
SUMMARY = {"count", "min", "mean", "median", "p90", "p95", "p99", "max"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dummy(tmp_path_factory.mktemp("bench-model"))


def arguments(benchmark: str, model: Path, *more: str) -> list[str]:
    common = ["--device", "cpu", "--model", str(model), "--load-format", "dummy"]
    return ["bench", benchmark, *common, *more]


def bench(benchmark: str, model: Path, *more: str) -> dict[str, Any]:
    """The one object that --json prints; the ranks leave nothing behind."""
    done = run_command(*arguments(benchmark, model, "--json", *more))
    assert done.returncode == 0, done.stderr
    assert processes_naming(str(model)) == []
    report: dict[str, Any] = json.loads(done.stdout)
    assert list(report) == REPORT
    assert report["command"][:3] == ["shardline", "bench", benchmark]
    assert set(report["environment"]) == ENVIRONMENT
    assert report["environment"]["gpus"] == []
    return report


def check_rates(values: dict[str, float]) -> None:
    """Positive; shares may pass 1 where a model fits into the caches of a CPU."""
    assert all(values[key] > 0 for key in RATES)


def test_latency(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    report = bench("latency", model, *SHORT, "--batch-size", "3", "--output", str(file))
    assert json.loads(file.read_text()) == report
    assert report["workload"] == {"num_requests": 3, "input_len": 5, "output_len": 4}
    assert report["model"]["load_format"] == "dummy"
    assert report["model"]["tensor_parallel_sizes"] == [1]
    result = report["result"]
    assert (result["warmup_rounds"], result["reported_rounds"]) == (1, 2)
    assert (len(result["rounds_ms"]), result["is_stable"]) == (2, False)
    for name, count in (("prefill", 2), ("decode_step", 2 * 3)):
        phase = result[name]
        assert set(phase) == PHASE
        assert set(phase["ms"]) == SUMMARY
        assert phase["ms"]["count"] == count
        assert phase["share_of_floor"] == pytest.approx(phase["floor_ms"] / phase["ms"]["median"])
        check_rates(phase)
    step = result["decode_step"]
    # By hand in tests/runner/bench/test_floor.py.
    step_bytes = 4 * (1080 + 3 * 8) + 3 * 2 * 7 * 32
    assert step["gb_per_s"] == pytest.approx(step_bytes / step["ms"]["median"] / 1e6)
    assert result["decode_tokens_per_s"] == pytest.approx(3e3 / step["ms"]["median"])

    text = describe(report).splitlines()
    assert text[0].startswith("latency of LlamaForCausalLM, random weights: float32, eager, 1 rank")
    assert text[3].startswith("batch of 3, 5 tokens in, 4 out; last 2 of 2 rounds after 1 warm-up")
    assert [line.split("  ")[0] for line in text[6:8]] == ["prefill", "decode step"]
    assert "a share above 100 %" not in describe(report)
    step["share_of_bandwidth"] = 1.04
    assert "a share above 100 %" in describe(report)


@pytest.mark.full
@pytest.mark.dist
def test_latency_of_two_ranks_counts_the_share_of_one(model: Path) -> None:
    report = bench("latency", model, *SHORT, "-tp", "2")
    step = report["result"]["decode_step"]
    layer, row, kv = 96 + 32 + 96 + 48, 8, 2 * 7 * 32
    step_bytes = 4 * (2 * (layer + 16) + 8 + 40 + row) + kv
    assert step["gb_per_s"] == pytest.approx(step_bytes / step["ms"]["median"] / 1e6)
    assert report["model"]["tensor_parallel_sizes"] == [2]
    assert len(report["model"]["weight_bytes"]) == 2


def test_one_token_each_has_no_decoding(model: Path) -> None:
    report = bench("latency", model, *SHORT, "--output-len", "1")
    assert report["result"]["decode_step"] is report["result"]["decode_tokens_per_s"] is None
    assert "decode step" not in describe(report)


@pytest.mark.full
@pytest.mark.dist
def test_throughput_of_more_requests_than_run_at_once(model: Path) -> None:
    """Seven requests, three at a time: three batches of four tokens, each in two groups."""
    limit = ("--set", "scheduler.max_num_seqs=3")
    report = bench("throughput", model, *SHORT, "--num-requests", "7", "-pp", "2", *limit)
    result = report["result"]
    assert result["num_steps"] == 3 * 4 * 2
    seconds = result["elapsed_s"]["median"]
    assert result["requests_per_s"] == pytest.approx(7 / seconds)
    assert result["output_tokens_per_s"] == pytest.approx(7 * 4 / seconds)
    assert result["total_tokens_per_s"] == pytest.approx(7 * 9 / seconds)
    check_rates(result["per_device"])
    assert "7 requests, 5 tokens in, 4 out" in describe(report)


@pytest.mark.full
def test_startup_is_measured_from_outside(model: Path) -> None:
    report = bench("startup", model, "--starts", "2", "--input-len", "5")
    assert report["limits"] is None
    starts = report["result"]["starts"]
    assert len(starts) == 2
    for start in starts:
        phases = start["phases_s"]
        assert list(phases) == ["process", "loading", "allocating", "first_step"]
        assert all(seconds >= 0 for seconds in phases.values())
        assert 0.1 < sum(phases.values()) <= start["seconds"]
    assert report["result"]["first_s"] == starts[0]["seconds"]
    assert report["result"]["later_s"]["count"] == 1
    assert "5 tokens in" in describe(report)


@pytest.mark.parametrize(
    ("benchmark", "mistake", "words"),
    [
        ("latency", ["--input-len", "60", "--output-len", "5"], ["65", "max_model_len=64"]),
        ("throughput", ["--input-len", "64"], ["64", "128", "max_model_len=64"]),
        ("startup", ["--input-len", "64"], ["65", "max_model_len=64"]),
        ("latency", [*SHORT, "--batch-size", "33"], ["33", "scheduler.max_num_seqs=32"]),
        ("latency", [*SHORT, "--output", "/nowhere/x.json"], ["--output /nowhere/x.json"]),
        ("throughput", [*SHORT, "--output", "/"], ["--output /"]),
        ("startup", ["--input-len", "5", "--load-format", "dumy"], ["'dumy'", "auto or dummy"]),
    ],
)
def test_a_mistake_is_one_clear_line(
    model: Path, benchmark: str, mistake: list[str], words: list[str]
) -> None:
    done = run_command(*arguments(benchmark, model, "-tp", "2", *mistake))
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert [word for word in words if word not in done.stderr] == [], done.stderr


def test_startup_under_torchrun_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    done = run_command(*arguments("startup", model, "--input-len", "5"))
    assert done.returncode == 2
    assert "without torchrun" in done.stderr


def test_a_start_that_fails_is_told_with_its_exit_code(model: Path) -> None:
    """The process that is started finds no memory for the cache; the one that starts it says so."""
    little = ("--set", "kv_cache.gpu_memory_utilization=1e-9")
    done = run_command(*arguments("startup", model, "--input-len", "5", *little))
    assert done.returncode == 6, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "weights and activations take" in done.stderr
