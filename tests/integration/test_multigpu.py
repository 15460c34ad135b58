"""Several GPUs and NCCL: every cut gives the tokens of one GPU, whatever carries them, and a rank
that is lost takes the job down at once.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import graph_jobs
import pynvml
import pytest
import rank_jobs
import torch
from endless import ends, generating, make_endless
from graph_jobs import CASES
from processes import processes_naming, rank_pid, run_command
from rank_pool import RankPool

from runner.text.tokenizer import Tokenizer

pytestmark = [pytest.mark.multigpu, pytest.mark.timeout(300)]

PROMPTS = [[3 + (7 * i + n) % 120 for i in range(n)] for n in (5, 19, 2, 33)]
GREEDY = {"temperature": 0.0}
SIZES = {
    "parallel.device": "cuda",
    "scheduler.max_num_batched_tokens": 32,
    "scheduler.max_num_seqs": 4,
}
CUTS = [[2], [1, 1]]
EXIT_WITHIN_S = 10.0
LEFT_BYTES = 64 * 2**20
"""What the driver may still count of a GPU's memory after a process has gone."""


@pytest.fixture(scope="module")
def gpu_pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    """Two ranks, each with a GPU."""
    pool = RankPool(2, tmp_path_factory.mktemp("gpu-pool"), device_type="cuda")
    yield pool
    pool.close()


@pytest.mark.parametrize("tp_sizes", CUTS, ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3", "gpt2", "qwen3"])
def test_ranks_give_the_tokens_of_one_gpu(
    name: str, tp_sizes: list[int], gpu_pool: RankPool, checkpoint: Callable[[str], Path]
) -> None:
    """Captured in CUDA graphs and call by call."""
    model = str(checkpoint(name))
    for eager in (False, True):
        settings = SIZES | {"compile.enforce_eager": eager}
        arguments = model, PROMPTS, 16, GREEDY, settings
        expected = gpu_pool.run(rank_jobs.complete, [1], *arguments)[0]
        assert gpu_pool.run(rank_jobs.complete, tp_sizes, *arguments)[0] == expected


def test_steps_that_run_ahead_or_not_choose_the_same(
    gpu_pool: RankPool, checkpoint: Callable[[str], Path]
) -> None:
    ways = [GREEDY, {"temperature": 1.3, "seed": 4}, {"repetition_penalty": 1.6}, GREEDY]
    settings = {"parallel.device": "cuda", "scheduler.max_num_seqs": 2}
    given = str(checkpoint("llama")), PROMPTS, 12, ways, frozenset[int](), settings
    found = gpu_pool.run(rank_jobs.complete_ahead_or_not, [2], *given)[0]
    assert found[0][0] == found[1][0]


@pytest.mark.parametrize("low_latency", [False, True], ids=["one shot", "low latency"])
def test_all_reduces_are_sums_of_any_size(low_latency: bool, gpu_pool: RankPool) -> None:
    """Those that one kernel adds up, and those that NCCL does."""
    job = partial(rank_jobs.all_reduce_errors, low_latency=low_latency)
    for errors in gpu_pool.run(job, [2]):
        assert all(error == 0 for error in errors.values()), errors


@pytest.mark.parametrize("tp_sizes", CUTS, ids=str)
def test_smollm2_of_uneven_ranks_gives_the_tokens_of_one_gpu(
    tp_sizes: list[int], gpu_pool: RankPool, smollm2: Path
) -> None:
    """Nine heads over two ranks are six and three."""
    tokenizer = Tokenizer.load(smollm2)
    prompts = [tokenizer.encode(text) for text in ("The capital of France is", "def fib(n):")]
    settings = {"parallel.device": "cuda"}
    arguments = str(smollm2), prompts, 48, GREEDY, settings
    expected = gpu_pool.run(rank_jobs.complete, [1], *arguments)[0]
    assert tokenizer.decode(expected[0]).startswith(" Paris.")
    assert gpu_pool.run(rank_jobs.complete, tp_sizes, *arguments)[0] == expected


@pytest.mark.parametrize(
    ("name", "tp_sizes"),
    [("unet", [1, 1]), ("vision", [2]), ("vision", [1, 1]), ("text", [2]), ("branches", [1, 1])],
    ids=str,
)
@pytest.mark.parametrize("enforce_eager", [False, True])
def test_a_divided_tensor_model_returns_what_the_model_returns(
    name: str, tp_sizes: list[int], enforce_eager: bool, gpu_pool: RankPool
) -> None:
    case = CASES[name]
    job = graph_jobs.make_job(case, [1])
    batches = graph_jobs.make_samples(job, [(0, count) for count in (4, 3, 1, 4, 2, 4, 4)])
    sections = {"parallel": {"device": "cuda"}, "compile": {"enforce_eager": enforce_eager}}
    reply = gpu_pool.run(graph_jobs.stream, tp_sizes, case, batches, sections)[0]
    assert reply is not None
    for batch, outputs in zip(batches, reply[0], strict=True):
        expected = graph_jobs.expected_of(case.module, job, batch)
        for got, wanted in zip(outputs, expected, strict=True):
            for a, b in zip(got, wanted, strict=True):
                assert a.dtype == b.dtype
                error = (a.double() - b.double()).abs().max()
                assert error <= 1e-4 * b.double().abs().max()


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model that can generate for minutes."""
    return make_endless(
        tmp_path_factory.mktemp("endless"),
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
    )


def generate(*more: str) -> list[str]:
    common = ["generate", "--prompt", "Hello", "--prompt", "once upon"]
    # A bundle knows its device.
    device = [] if "--bundle" in more else ["--device", "cuda"]
    return [*common, *device, "--temperature", "0", "--max-tokens", "24", "--json", *more]


def test_torchrun_and_the_launcher_say_the_same(text_model: Path) -> None:
    torchrun = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", "2", "-m", "runner"),
    ]
    model = ["--model", str(text_model)]
    one = run_command(*generate(*model))
    assert one.returncode == 0, one.stderr
    ways = [
        ["-tp", "2", "--set", f"distributed.all_reduce={way}"] for way in ("nccl", "low_latency")
    ]
    for cut in (["-tp", "2"], ["-pp", "2"], *ways):
        own = run_command(*generate(*model, *cut))
        assert own.returncode == 0, own.stderr
        assert own.stdout == one.stdout
    joined = run_command(*generate(*model, "-tp", "2"), launcher=torchrun)
    assert joined.returncode == 0, joined.stderr
    assert joined.stdout == one.stdout


@pytest.mark.parametrize("backend", ["eager", "inductor", "tensorrt"])
@pytest.mark.parametrize("cut", ["-tp", "-pp"])
def test_a_bundle_of_two_gpus_runs_in_a_fresh_process(
    backend: str, cut: str, text_model: Path, tmp_path: Path
) -> None:
    dtype = "bfloat16" if backend == "tensorrt" else "float32"
    bundle = str(tmp_path / "bundle")
    options = ["--model", str(text_model), cut, "2", "--device", "cuda", "--dtype", dtype]
    limits = {"scheduler.max_num_seqs": 4, "scheduler.max_num_batched_tokens": 32}
    settings = limits | {
        "compile.backend": backend,
        "compile.buckets": "[4,32]",
        "model.max_model_len": 4096,
    }
    options += [item for key, value in settings.items() for item in ("--set", f"{key}={value}")]
    made = run_command("compile", *options, "--output", bundle, timeout_s=280)
    assert made.returncode == 0, made.stderr
    ran = run_command(*generate("--bundle", bundle))
    assert ran.returncode == 0, ran.stderr
    if dtype == "float32":
        options = ["--model", str(text_model), "--dtype", dtype, "--max-model-len", "4096"]
        assert ran.stdout == run_command(*generate(*options)).stdout


def used_bytes() -> list[int]:
    pynvml.nvmlInit()
    handles = map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount()))
    return [int(pynvml.nvmlDeviceGetMemoryInfo(handle).used) for handle in handles]


@pytest.fixture(autouse=True)
def _leave_nothing(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that fails must not spoil the next one."""
    yield
    if "text_model" in request.fixturenames:
        for pid in processes_naming(str(request.getfixturevalue("text_model"))):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("cut", ["-tp", "-pp"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_is_named_and_memory_is_free(cut: str, rank: int, text_model: Path) -> None:
    before = used_bytes()
    job = generating(text_model, "--device", "cuda", cut, "2")
    assert any(now > then + LEFT_BYTES for now, then in zip(used_bytes(), before, strict=True))
    os.kill(rank_pid(str(text_model), rank), signal.SIGKILL)
    exit_code, line = ends(job, text_model, within_s=EXIT_WITHIN_S)
    assert exit_code == 8
    assert line.startswith(f"shardline: rank {rank} (")
    assert "killed by SIGKILL" in line
    deadline = time.monotonic() + 2
    while time.monotonic() < deadline:
        after = used_bytes()
        if all(now <= then + LEFT_BYTES for now, then in zip(after, before, strict=True)):
            return
        time.sleep(0.1)
    pytest.fail(f"{after} bytes are in use, {before} were before")


@pytest.mark.parametrize("cut", ["-tp", "-pp"])
def test_a_stalled_rank_is_named(cut: str, text_model: Path) -> None:
    timeout_s = 5
    setting = f"distributed.collective_timeout_s={timeout_s}"
    job = generating(text_model, "--device", "cuda", cut, "2", "--set", setting)
    os.kill(rank_pid(str(text_model), 1), signal.SIGSTOP)
    exit_code, line = ends(job, text_model, within_s=timeout_s + 2 * EXIT_WITHIN_S)
    assert exit_code == 9, line
    assert "no sign of life from rank 1" in line


def test_gpus_that_are_not_there_are_refused(text_model: Path) -> None:
    too_many = torch.cuda.device_count() + 1
    done = run_command(*generate("--model", str(text_model), "-pp", str(too_many)))
    assert done.returncode in (2, 3)
    assert f"{torch.cuda.device_count()} GPUs" in done.stderr


def test_one_shot_is_what_auto_takes_here(gpu_pool: RankPool) -> None:
    found: list[Any] = gpu_pool.run(rank_jobs.small_sums, [2])
    assert found == ["OneShot", "OneShot"]
