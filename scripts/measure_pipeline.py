"""Measure on the CPU: a balanced model as two stages on two cores, beside one stage on one core.

One thread a rank. Both run in turn, several times, and the fastest run of each counts: whatever
else the machine does can only slow a run down. Then requests come to the two stages through dynamic
batching, at twice and at half of what they can do. Prints tables for people and, last, a JSON
object.
"""

import json
import os
import platform
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

import graph_jobs  # noqa: E402
from rank_pool import RankPool  # noqa: E402

from parallel.schedule import bubble  # noqa: E402
from runner.pipeline.rank import PipelineReport  # noqa: E402

ROUNDS = 6
RUNS = 10
"""Of each, in a round."""

NUM_BATCHES = 30

LOADED_S = 10.0


def measure(pool: RankPool) -> dict[int, list[PipelineReport]]:
    """Runs of one stage and of two, in turn."""
    found: dict[int, list[PipelineReport]] = {1: [], 2: []}
    for _ in range(ROUNDS):
        for stages, reports in found.items():
            reports += pool.run(graph_jobs.throughput, [1] * stages, NUM_BATCHES, RUNS)[0]
    return found


def row(reports: list[PipelineReport]) -> dict[str, Any]:
    """The figures of the fastest of some runs."""
    best = min(reports, key=lambda report: report.seconds)
    stage_times = [busy_s / NUM_BATCHES for busy_s in best.busy_s]
    return {
        "stages": len(stage_times),
        "batches_per_s": round(NUM_BATCHES / best.seconds, 1),
        "median": round(NUM_BATCHES / median(report.seconds for report in reports), 1),
        "stage_times_ms": [round(1e3 * time, 2) for time in stage_times],
        "bubble_measured": round(best.bubble, 3),
        "bubble_predicted": round(bubble(len(stage_times), NUM_BATCHES, stage_times), 3),
    }


def load_rows(report: graph_jobs.LoadReport) -> list[dict[str, Any]]:
    """What dynamic batching did at each rate."""
    policy = graph_jobs.LOAD_POLICY
    return [
        {
            "rate": name,
            "requests": counts.submitted,
            "refused": counts.rejected,
            "mean_batch": round(counts.mean_batch_size, 1),
            "max_batch": policy.max_batch_size,
            "cut_because": " ".join(f"{why}:{count}" for why, count in counts.by_reason.items()),
            "wait_p50_ms": round(1e3 * counts.wait_p50_s, 1),
            "wait_p99_ms": round(1e3 * counts.wait_p99_s, 1),
            "delay_ms": policy.max_queue_delay_ms,
            "batch_p50_ms": round(1e3 * counts.batch_p50_s, 1),
        }
        for name, counts in (("twice", report.twice), ("half", report.half))
    ]


def table(rows: list[dict[str, Any]]) -> str:
    names = list(rows[0])
    cells = [names, *([str(row[name]) for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    return "\n".join(
        "  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in cells
    )


def main() -> None:
    if len(os.sched_getaffinity(0)) < 2:
        sys.exit("two stages need two cores, and this process may use one")
    with tempfile.TemporaryDirectory() as folder:
        pool = RankPool(2, Path(folder))
        try:
            rows = [row(reports) for reports in measure(pool).values()]
            load = pool.run(graph_jobs.under_load, [1, 1], LOADED_S)[0]
        finally:
            pool.close()
    result = {
        "cores": len(os.sched_getaffinity(0)),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "num_batches": NUM_BATCHES,
        "ratio": round(rows[1]["batches_per_s"] / rows[0]["batches_per_s"], 2),
        "ratio_of_medians": round(rows[1]["median"] / rows[0]["median"], 2),
        "rows": rows,
        "requests_per_s": [round(rate) for rate in load.capacity],
        "load": load_rows(load),
    }
    for found in (rows, result["load"]):
        print(table(found), end="\n\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
