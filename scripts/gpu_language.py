"""Decode, prefill and throughput of a bundle: see scripts/gpu_check.

    gpu_language.py BUNDLE 8b|70b RESULT.json [KEY=VALUE ...]

What `shardline bench` measures, workload after workload, with the model loaded once. Where the
bundle has several ranks, torchrun starts this once a rank; rank 0 writes. KEY=VALUE is as `--set`.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from gpu_collectives import all_reduce_s  # noqa: E402

from parallel.context import ParallelContext  # noqa: E402
from parallel.launch import RankEnv, adopt  # noqa: E402
from runner.bench.floor import DeviceLimits, WorkCount  # noqa: E402
from runner.bench.front import RoundsFront  # noqa: E402
from runner.bench.measure import measure_limits  # noqa: E402
from runner.bench.report import latency_result, throughput_result  # noqa: E402
from runner.bench.rounds import Repeat, Round  # noqa: E402
from runner.bench.stats import summarize  # noqa: E402
from runner.bench.workload import Workload  # noqa: E402
from runner.bundled import open_job  # noqa: E402
from runner.engine.loading import load_stage  # noqa: E402
from runner.engine.rank import loop, make_engine  # noqa: E402
from runner.planning import DecoderJob  # noqa: E402

DECODE = {"8b": (1, 8, 32, 128), "70b": (1, 32)}
PREFILL = {"8b": (1, 8), "70b": (1,)}
INPUT_LEN, OUTPUT_LEN, PREFILL_LEN = 128, 64, 2048


def decode_s(round_: Round) -> float:
    return summarize(round_.decode_steps_s or [round_.prefill_s]).median


class Measurement:
    """A loaded bundle, and what one workload after the other finds."""

    def __init__(self, bundle: Path, overrides: list[str]) -> None:
        job = open_job(bundle, overrides=overrides, accept_parity=True)
        assert isinstance(job, DecoderJob)
        self.job = job
        self.context = ParallelContext.open(
            job.plan.topology,
            adopt() or RankEnv(0, 1),
            device_type="cuda",
            all_reduce=job.config.distributed.all_reduce,
        )
        started = time.monotonic()
        self.stage_runner = load_stage(job, self.context)
        torch.cuda.synchronize()
        self.load_s = time.monotonic() - started
        self.dtype = getattr(torch, job.plan.dtype)
        self.limits = measure_limits(self.context.device, self.dtype)

    def run(
        self,
        workload: Workload,
        metric: Callable[[Round], float],
        result_of: Callable[..., dict[str, Any]],
        *,
        max_rounds: int = 6,
    ) -> dict[str, Any]:
        """A fresh engine each time: nothing is in its cache that another workload left.

        Returns:
            The result on rank 0; nothing elsewhere.
        """
        repeat, config = Repeat(metric, 1, max_rounds), self.job.config
        front = RoundsFront(
            workload,
            repeat,
            vocab_size=self.job.spec.config.vocab_size,
            max_num_seqs=config.scheduler.max_num_seqs,
            measure_limits=self._known_limits,
        )
        mine = front if self.context.rank == 0 else None
        loop(make_engine(self.job, self.stage_runner, mine), mine)
        if mine is None:
            return {}
        count = WorkCount(self.job.plan, self.job.spec.config, workload)
        return result_of(front, repeat, count)

    def all_reduces_s(self, num_rows: int) -> float:
        """What a step's all-reduces take by themselves: two a layer, and one of the embedding."""
        if self.context.tp.size == 1:
            return 0.0
        hidden_size = self.job.spec.config.hidden_size
        one_s = all_reduce_s(self.context, (num_rows, hidden_size), self.dtype)
        return (2 * self.job.spec.config.num_layers + 1) * one_s

    def _known_limits(self) -> DeviceLimits:
        return self.limits


def main(bundle: Path, which: str, output: Path, overrides: list[str]) -> None:
    measurement = Measurement(bundle, overrides)
    is_first = measurement.context.rank == 0
    is_whole = measurement.context.world.size > 1
    prefix = {"8b": "", "70b": "70B, " if is_whole else "70B rank, "}[which]
    figures: dict[str, float] = {f"{prefix}load, s": measurement.load_s}
    results: dict[str, Any] = {}

    def save() -> None:
        if not is_first:
            return
        rates = {
            "read_tb_per_s": measurement.limits.bytes_per_s / 1e12,
            "matmul_tflop_per_s": measurement.limits.flops_per_s / 1e12,
        }
        content = {"limits": rates, "figures": figures, "results": results}
        output.write_text(json.dumps(content, indent=1) + "\n")

    for batch in DECODE[which]:
        workload = Workload(batch, INPUT_LEN, OUTPUT_LEN)
        all_reduces_s = measurement.all_reduces_s(batch)
        found = measurement.run(workload, decode_s, latency_result)
        if not is_first:
            continue
        step = found["decode_step"]
        results[f"decode {batch}"] = found
        figures[f"{prefix}decode {batch}, ms a step"] = step["ms"]["median"]
        prefill = found["prefill"]["ms"]["median"]
        figures[f"{prefix}prefill {batch} x {INPUT_LEN}, ms"] = prefill
        share = step["share_of_floor"]
        figures[f"{prefix}decode {batch}, share of the floor"] = share
        figures[f"{prefix}decode {batch}, times the floor"] = 1 / share
        if all_reduces_s:
            figures[f"{prefix}decode {batch}, all-reduces, ms"] = 1e3 * all_reduces_s
            floor_ms = step["floor_ms"] + 1e3 * all_reduces_s
            share = floor_ms / step["ms"]["median"]
            figures[f"{prefix}decode {batch}, share of the floor with all-reduces"] = share
        save()
    for batch in PREFILL[which]:
        workload = Workload(batch, PREFILL_LEN, 1)
        found = measurement.run(workload, decode_s, latency_result)
        if not is_first:
            continue
        results[f"prefill {batch}"] = found
        name = f"{prefix}prefill {batch} x {PREFILL_LEN}"
        figures[f"{name}, ms"] = found["prefill"]["ms"]["median"]
        figures[f"{name}, share of the matmul rate"] = found["prefill"]["share_of_matmul_rate"]
        save()
    if which == "8b":
        workload = Workload(256, INPUT_LEN, INPUT_LEN)
        found = measurement.run(workload, lambda r: r.elapsed_s, throughput_result, max_rounds=3)
        if is_first:
            results["throughput"] = found
            figures["256 requests, output tokens/s"] = found["output_tokens_per_s"]
        save()
    measurement.stage_runner.close()
    measurement.context.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4:])
