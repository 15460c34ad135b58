"""Measure on the CPU: a balanced model as two stages on two cores, beside one stage on one core.

One thread a rank. Both run in turn, several times, and the medians are compared. Then requests come
to two stages through dynamic batching, at twice and at half of what they can do. Prints tables for
people and, last, a JSON object.
"""

import json
import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

import graph_jobs  # noqa: E402
from rank_pool import RankPool  # noqa: E402

from runner.pipeline.rank import PipelineReport  # noqa: E402

ROUNDS = 6
RUNS = 5
"""Of each, in a round."""

NUM_BATCHES = 12

LOADED_S = 10.0


def measure(pool: RankPool) -> dict[int, list[PipelineReport]]:
    """Runs of one stage and of two, in turn."""
    found: dict[int, list[PipelineReport]] = {1: [], 2: []}
    for _ in range(ROUNDS):
        for stages, reports in found.items():
            reports += pool.run(graph_jobs.throughput, [1] * stages, NUM_BATCHES, RUNS)[0]
    return found


def row(reports: list[PipelineReport]) -> dict[str, Any]:
    """The figures of the run in the middle, and the rate of the fastest."""
    by_time = sorted(reports, key=lambda report: report.seconds)
    middle = by_time[len(by_time) // 2]
    return {
        "stages": len(middle.busy_s),
        "batches_per_s": round(NUM_BATCHES / middle.seconds, 2),
        "fastest": round(NUM_BATCHES / by_time[0].seconds, 2),
        "stage_times_ms": [round(1e3 * busy_s / NUM_BATCHES, 1) for busy_s in middle.busy_s],
        "bubble_measured": round(middle.bubble, 3),
        "bubble_predicted": round(middle.predicted_bubble, 3),
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
        "ratio_of_fastest": round(rows[1]["fastest"] / rows[0]["fastest"], 2),
        "rows": rows,
        "requests_per_s": [round(rate) for rate in load.capacity],
        "load": load_rows(load),
    }
    for found in (rows, result["load"]):
        print(table(found), end="\n\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
