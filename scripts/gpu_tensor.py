"""Tensor models on one GPU: see scripts/gpu_check.

    gpu_tensor.py OUT RESULT.json [--models MODEL ...] [--backends BACKEND ...]

Compiles each model with each backend, then runs batches of its smallest and largest bucket: one
after the other, which gives the latency, and several in flight, where copies overlap with
computing. On a GPU requests of one sample follow, put together by dynamic batching, and not. The
vision examples run on this host's CPU, too, all of its cores, by PyTorch.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from gpu_profile import shares_beside_kernels  # noqa: E402
from gpu_report import child_environment  # noqa: E402

from parallel.context import ParallelContext  # noqa: E402
from parallel.graph_twin import values_of  # noqa: E402
from parallel.launch import RankEnv  # noqa: E402
from runner.bundled import open_job  # noqa: E402
from runner.graph_planning import GraphJob  # noqa: E402
from runner.joining import MOST_HOST_THREADS  # noqa: E402
from runner.pipeline.batch_metrics import BatchMetrics  # noqa: E402
from runner.pipeline.batch_service import BatchService  # noqa: E402
from runner.pipeline.batching_policy import BatchingPolicy  # noqa: E402
from runner.pipeline.buckets import Buckets  # noqa: E402
from runner.pipeline.check import random_inputs  # noqa: E402
from runner.pipeline.loading import load_worker  # noqa: E402
from runner.pipeline.pipeline import Pipeline, Sample  # noqa: E402
from runner.pipeline.programs import batch_size, sample_shapes  # noqa: E402
from runner.pipeline.rank import run_worker  # noqa: E402

BACKENDS = ("tensorrt", "inductor", "eager")
ON_CPU = ("eager", "cpu")
LATENCIES = {"cuda": 30, "cpu": 5}
IN_FLIGHT = {"cuda": 40, "cpu": 8}
TRACED = 8
"""Batches that are submitted at once."""
SINGLES = 2000
"""Requests of one sample."""

RESNET = """version: 1
model:
  path: scripts/resnet50.py
  load_format: dummy
  factory: "resnet50:resnet50"
  factory_path: scripts
  dtype: float16
  inputs: [{name: image, shape: [batch, 3, 224, 224]}]
security: {factories: ["resnet50:resnet50"]}
"""


@dataclass(frozen=True)
class Model:
    """A plan and what is changed in it.

    Attributes:
        plan: below examples/; empty: ResNet-50.
        settings: as for `--set`.
        buckets: batch sizes.
        is_vision: it is compared with the CPU.
    """

    name: str
    plan: str
    settings: tuple[str, ...]
    buckets: tuple[int, ...]
    is_vision: bool = False


@dataclass(frozen=True)
class Row:
    """A figure, as `gpu_check` shows it."""

    subject: str
    what: str
    value: float


def models() -> Iterator[Model]:
    yield Model("ResNet-50 fp16", "", (), (1, 64))
    dummy = "model.load_format=dummy"
    anything = "model.path=pyproject.toml"
    tf32 = "compile.allow_tf32=true"
    yield Model("EfficientNet-Lite0", "efficientnet/plan.yaml", (dummy, anything), (1, 64), True)
    yield Model("PointNet", "lidar/plan.yaml", (tf32,), (1, 16))
    ct = (dummy, anything, "model.dtype=bfloat16")
    yield Model("3-D ResNet-152 bf16", "ct/plan.yaml", ct, (1,), True)
    if (package := find_spec("rapidocr_onnxruntime")) and package.origin:
        folder = Path(package.origin).parent
        path = f"model.path={next(folder.rglob('*_det_infer.onnx'))}"
        yield Model("PP-OCR detector", "ocr/plan.yaml", (path, tf32), (1, 4), True)
        path = f"model.path={next(folder.rglob('*_rec_infer.onnx'))}"
        settings = (path, tf32, "model.dims.width=[320]")
        yield Model("PP-OCR recogniser", "ocr/recognize.yaml", settings, (1, 16), True)


def compile_model(
    model: Model, backend: str, out: Path, *, num_stages: int = 1, device_type: str = "cuda"
) -> tuple[Path, float, int]:
    """Its bundle, the seconds that it took, and the exit code. Stages are cut by measured times."""
    plan = ROOT / "examples" / model.plan
    if not model.plan:
        plan = out / "resnet50.yaml"
        plan.write_text(RESNET)
    on = "" if device_type == "cuda" else f"-{device_type}"
    bundle = out / f"{model.name.replace(' ', '-')}-{backend}-pp{num_stages}{on}"
    settings = [
        *model.settings,
        f"compile.backend={backend}",
        f"compile.buckets={list(model.buckets)}",
        f"scheduler.max_batch_size={model.buckets[-1]}",
        "scheduler.preferred_batch_size=null",
        f"parallel.pipeline_parallel_size={num_stages}",
        f"parallel.device={device_type}",
    ]
    started = time.monotonic()
    if num_stages > 1:
        cut = out / f"cut-{bundle.name}.json"
        if code := command(cut, "plan", plan, settings, "--measure", "--json"):
            return bundle, time.monotonic() - started, code
        points = json.loads(cut.read_text())["measured"]["split_points"]
        settings.append(f"parallel.split_points={json.dumps(points)}")
    log = out / f"compile-{bundle.name}.log"
    code = command(log, "compile", plan, settings, "--output", str(bundle), "--overwrite")
    return bundle, time.monotonic() - started, code


def command(output: Path, name: str, plan: Path, settings: list[str], *options: str) -> int:
    """Run a command of shardline on a plan; its exit code. What it says goes into a file, its
    standard error into one beside that; the end of which is shown where it failed.
    """
    arguments = [sys.executable, "-P", "-m", "runner", name, "--config", str(plan), *options]
    for setting in settings:
        arguments += ["--set", setting]
    environment, errors = child_environment(), output.with_name(f"{output.name}.err")
    with output.open("w") as said, errors.open("w") as complained:
        code = subprocess.run(
            arguments, cwd=ROOT, stdout=said, stderr=complained, env=environment, timeout=300
        ).returncode
    if code:
        print("".join(errors.read_text().splitlines(keepends=True)[-3:]), file=sys.stderr)
    return code


class Measurement:
    """What batches through one loaded bundle take."""

    def __init__(self, bundle: Path, device_type: str) -> None:
        job = open_job(bundle, accept_parity=True)
        assert isinstance(job, GraphJob)
        assert job.bundle is not None
        self.parity: dict[str, object] = job.bundle.manifest.parity
        self._job = job
        # As `confine` has it, but for the cores near the GPU: the CPU's figures, which come later
        # in this process, are of all of them.
        num_cores = len(os.sched_getaffinity(0))
        is_cpu = device_type == "cpu"
        torch.set_num_threads(num_cores if is_cpu else min(num_cores, MOST_HOST_THREADS))
        self._context = ParallelContext.open(
            job.plan.topology, RankEnv(0, 1), device_type=device_type
        )
        self._worker = load_worker(job, self._context)

    def bucket(self, index: int) -> dict[str, float]:
        """Figures of one batch size."""
        size = batch_size(self._job.plan.buckets[index], self._job.plan)
        inputs = random_inputs(values_of(self._job.plan.buckets[index]))
        samples = [[x[row] for x in inputs] for row in range(size)]
        found: dict[str, float] = {}
        device_type = self._context.device.type

        def use(pipeline: Pipeline) -> None:
            pipeline.submit(index, samples).result()
            times = [elapsed(pipeline, 1) for _ in range(LATENCIES[device_type])]
            found["latency, ms"] = 1e3 * median(times)
            count = IN_FLIGHT[device_type]
            found["samples/s"] = count * size / elapsed(pipeline, count)

        def elapsed(pipeline: Pipeline, count: int) -> float:
            started = time.perf_counter()
            answers = [pipeline.submit(index, samples) for _ in range(count)]
            for answer in answers:
                answer.result()
            return time.perf_counter() - started

        run_worker(self._job, self._worker, self._context, use)
        if device_type == "cpu":
            return found

        def use_traced(pipeline: Pipeline) -> None:
            elapsed(pipeline, TRACED)

        with profile(activities=[ProfilerActivity.CUDA]) as recorded:
            run_worker(self._job, self._worker, self._context, use_traced)
        found["copies beside kernels"] = shares_beside_kernels(recorded)["copies"]
        found["GPU, ms a batch"] = self._replay_ms(index)
        return found

    def singles(self, most: int) -> float:
        """Samples a second of requests for one, of which enough wait to fill the largest bucket.

        Args:
            most: that one batch takes of them.
        """
        plan = self._job.plan
        inputs = random_inputs(values_of(plan.buckets[0]))
        sample, shapes = [x[0] for x in inputs], sample_shapes(plan.buckets[0], plan)
        buckets, num_stages = Buckets.of(plan), len(plan.stages)
        policy = BatchingPolicy.of(self._job.config.scheduler, is_batched=True)
        num_waiting = (num_stages + 2) * policy.max_batch_size
        policy = replace(policy, max_batch_size=most, max_queue_size=num_waiting)
        seconds = 0.0

        def use(pipeline: Pipeline) -> None:
            nonlocal seconds

            def execute(_: object, samples: list[Sample]) -> Future[list[list[torch.Tensor]]]:
                return pipeline.submit(buckets.choose(shapes, len(samples)), samples)

            with BatchService(
                policy, execute, BatchMetrics(), max_in_flight=num_stages + 1
            ) as service:
                started = time.perf_counter()
                waiting = deque(service.submit(None, sample) for _ in range(num_waiting))
                for _ in range(SINGLES - num_waiting):
                    waiting.popleft().result()
                    waiting.append(service.submit(None, sample))
                for answer in waiting:
                    answer.result()
                seconds = time.perf_counter() - started

        run_worker(self._job, self._worker, self._context, use)
        return SINGLES / seconds

    def _replay_ms(self, index: int) -> float:
        """Of the captured graph alone."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(LATENCIES["cuda"]):
            self._worker.run(index, 0)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / LATENCIES["cuda"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("result", type=Path)
    known = {model.name: model for model in models()}
    parser.add_argument("--models", nargs="+", choices=known, default=list(known))
    parser.add_argument(
        "--backends", nargs="*", choices=BACKENDS, default=BACKENDS, help="none: only the CPU's"
    )
    arguments = parser.parse_args()
    rows: list[Row] = []
    for name in arguments.models:
        model = known[name]
        ways = [(backend, "cuda") for backend in arguments.backends]
        for backend, device_type in [*ways, ON_CPU] if model.is_vision else ways:
            rows += figures(model, backend, device_type, arguments.out)
            content = json.dumps([asdict(row) for row in rows], indent=1)
            arguments.result.write_text(content + "\n")


def figures(model: Model, backend: str, device_type: str, out: Path) -> Iterator[Row]:
    """Of one bundle, compiled here."""
    subject = f"{model.name}, {backend}" + (" on the CPU" if device_type == "cpu" else "")
    bundle, seconds, code = compile_model(model, backend, out, device_type=device_type)
    yield Row(subject, "compile, s", seconds)
    if code:
        yield Row(subject, "compile FAILED with exit code", code)
        return
    measurement = Measurement(bundle, device_type)
    yield Row(subject, "parity passed", bool(measurement.parity["passed"]))
    for index, size in enumerate(model.buckets):
        for what, value in measurement.bucket(index).items():
            yield Row(subject, f"batch {size}: {what}", value)
    if device_type == "cuda" and len(model.buckets) > 1:
        for most in model.buckets:
            rate = measurement.singles(most)
            yield Row(subject, f"single requests, {most} a batch: samples/s", rate)
    del measurement
    torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
