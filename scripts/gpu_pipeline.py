"""Throughput of a tensor model's bundle, of one stage or several: see scripts/gpu_check.

    gpu_pipeline.py BUNDLE RESULT.json      torchrun starts this once a rank

The samples are a batch of the largest bucket, submitted again and again.
"""

import json
import sys
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from gpu_profile import shares_beside_kernels  # noqa: E402

from parallel.collectives import all_gather_bytes  # noqa: E402
from parallel.context import ParallelContext  # noqa: E402
from parallel.graph_twin import values_of  # noqa: E402
from parallel.launch import RankEnv, adopt  # noqa: E402
from runner.bundled import open_job  # noqa: E402
from runner.graph_planning import GraphJob  # noqa: E402
from runner.joining import confine  # noqa: E402
from runner.pipeline.check import random_inputs  # noqa: E402
from runner.pipeline.loading import load_worker  # noqa: E402
from runner.pipeline.pipeline import Pipeline  # noqa: E402
from runner.pipeline.programs import batch_size  # noqa: E402
from runner.pipeline.rank import run_worker  # noqa: E402

WARM_UPS, BATCHES, TRACED = 8, 80, 12
RUNS = 3
AT_ONCE = 8
"""Batches that are under way; more would only wait."""


def main(bundle: Path, result: Path) -> None:
    job = open_job(bundle, accept_parity=True)
    assert isinstance(job, GraphJob)
    context = ParallelContext.open(
        job.plan.topology, adopt() or RankEnv(0, 1), device_type="cuda", init_timeout_s=600
    )
    confine(job, context)
    worker = load_worker(job, context)
    all_gather_bytes(b"", context.setup)
    index = len(job.plan.buckets) - 1
    size = batch_size(job.plan.buckets[index], job.plan)
    inputs = random_inputs(values_of(job.plan.buckets[index]))
    samples = [[x[row] for x in inputs] for row in range(size)]

    def stream(count: int) -> dict[str, object] | None:
        """So many batches through all stages; what rank 0 found."""

        def use(pipeline: Pipeline) -> None:
            under_way = [pipeline.submit(index, samples) for _ in range(min(count, AT_ONCE))]
            for _ in range(count - len(under_way)):
                under_way.pop(0).result()
                under_way.append(pipeline.submit(index, samples))
            for answer in under_way:
                answer.result()

        worker.busy.reset()
        report = run_worker(job, worker, context, use if context.rank == 0 else None)
        if report is None:
            return None
        return {
            "samples/s": report.num_batches * size / report.seconds,
            "busy a batch, ms": [1e3 * busy / report.num_batches for busy in report.busy_s],
            "bubble": report.bubble,
        }

    stream(WARM_UPS)
    runs = [stream(BATCHES) for _ in range(RUNS)]
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        stream(TRACED)
    transfers = all_gather_bytes(
        json.dumps(shares_beside_kernels(recorded)).encode(), context.setup
    )
    if context.rank == 0:
        found = {
            "batch": size,
            "runs": runs,
            "beside kernels": [json.loads(message) for message in transfers],
        }
        result.write_text(json.dumps(found, indent=1) + "\n")
    worker.close()
    context.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
