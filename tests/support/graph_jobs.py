"""Tensor models at work on the ranks of a `RankPool`: small models, jobs of them, and streams."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from apply_jobs import TEXT_PLAN, VISION_PLAN, Text, Vision
from batch_load import BatchLoad
from graph_models import Mlp, UNet
from torch import nn
from torch.utils import _pytree as pytree

from parallel.collectives import all_gather_bytes
from parallel.context import ParallelContext
from parallel.launch import RankEnv
from parallel.relay import Header, Order, Relay, wait_for
from parallel.topology import Topology
from runner.config.schema import RunnerConfig
from runner.graph_planning import GraphJob
from runner.items.listing import list_items
from runner.items.writing import open_output_folder
from runner.pipeline.batch_metrics import BatchMetrics, BatchSnapshot
from runner.pipeline.batch_service import BatchService
from runner.pipeline.batching_policy import BatchingPolicy
from runner.pipeline.buckets import Buckets, Shapes
from runner.pipeline.check import check_sharded
from runner.pipeline.loading import load_worker
from runner.pipeline.offline import OfflineRun, outputs_of
from runner.pipeline.pipeline import Pipeline
from runner.pipeline.rank import PipelineReport, run_worker
from runner.pipeline.stage_worker import StageWorker
from runner.sources.tensor_model import TensorModel

Sample = list[torch.Tensor]
Outputs = list[torch.Tensor]


class Branches(nn.Module):
    """Returns what it is given, twice one value, labels, and values made early and late."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 6)
        self.third, self.fourth = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> dict[str, Any]:
        early = self.first(x) * ids[:, None]
        late = self.fourth(torch.relu(self.third(self.second(early))))
        return {"late": late, "x": x, "others": [early, late, late.argmax(-1), ids > 0]}


class Fails(nn.Module):
    """Four matrices; the third of them raises where a sample holds an index that is too large."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.table = nn.Embedding(10, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.parts[1](self.parts[0](ids.float()))
        output: torch.Tensor = self.parts[2](x) + self.table(ids).sum(1)
        return output


class Chain(nn.Module):
    """As many matrices as there are to be stages; takes a while where it is wide."""

    def __init__(self, length: int, width: int = 4) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(width, width) for _ in range(length))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in self.parts:
            x = torch.tanh(part(x))
        return x


@dataclass(frozen=True)
class Case:
    """A model and how it is given to a job.

    Attributes:
        inputs, dims: as in the configuration.
        split_points: by the number of stages, where the cut by cost would not do.
    """

    make: Callable[[], nn.Module]
    inputs: list[dict[str, Any]]
    dims: dict[str, list[int]] = field(default_factory=dict)
    tp_plan: dict[str, str] | None = None
    split_points: dict[int, list[str]] = field(default_factory=dict)

    @property
    def module(self) -> nn.Module:
        torch.manual_seed(0)
        return self.make().eval()


def _input(name: str, shape: list[Any], dtype: str = "float32") -> dict[str, Any]:
    return {"name": name, "shape": shape, "dtype": dtype}


CASES = {
    "unet": Case(UNet, [_input("image", ["batch", 2, "height", 16])], {"height": [8, 16]}),
    "vision": Case(
        Vision,
        [_input("image", ["batch", 3, 8, 8])],
        tp_plan=VISION_PLAN,
        split_points={2: ["blocks.1"]},
    ),
    "text": Case(
        partial(Text, 6),
        [_input("ids", ["batch", 6], "int64"), _input("mask", ["batch", 6], "bool")],
        tp_plan=TEXT_PLAN,
        split_points={2: ["layers.1"]},
    ),
    "branches": Case(Branches, [_input("x", ["batch", 6]), _input("ids", ["batch"], "int32")]),
    "no batch": Case(
        Mlp,
        [_input("x", ["rows", 8])],
        {"rows": [3, 5]},
        tp_plan={"blocks.*.up": "colwise", "blocks.*.down": "rowwise"},
        split_points={2: ["blocks.1.up"]},
    ),
    "chain": Case(partial(Chain, 6), [_input("x", ["batch", 4])]),
    "fails": Case(
        Fails,
        [_input("ids", ["batch", 4], "int64")],
        split_points={2: ["parts.2"], 3: ["parts.1", "parts.2"]},
    ),
}


def make_job(case: Case, tp_sizes: Sequence[int], **sections: dict[str, Any]) -> GraphJob:
    """A job on the CPU in float32, or what `model.dtype` says.

    Args:
        sections: of the configuration, merged with what the case says.
    """
    parallel: dict[str, Any] = {
        "device": "cpu",
        "stages": [{"tensor_parallel_size": size} for size in tp_sizes],
        "tp_plan": case.tp_plan if max(tp_sizes) > 1 else None,
        "split_points": case.split_points.get(len(tp_sizes)),
    }
    model = {"path": ".", "factory": "none:none", "inputs": case.inputs, "dims": case.dims}
    given = {
        "model": model,
        "parallel": parallel,
        "scheduler": {"max_batch_size": 4},
        "compile": {"buckets": [4]},
    }
    merged = {name: given.get(name, {}) | sections.get(name, {}) for name in given | sections}
    config = RunnerConfig.model_validate({"version": 1, **merged})
    dtype = config.model.dtype if config.model.dtype != "auto" else "float32"
    module = case.module.to(getattr(torch, dtype))
    return GraphJob.of(config, TensorModel(module, type(module).__name__, dtype, ()))


def make_samples(job: GraphJob, counts: Sequence[tuple[int, int]]) -> list[list[Sample]]:
    """Batches of random samples: for each a kind of shapes, and how many."""
    generator = torch.Generator().manual_seed(len(counts))
    kinds = list(Buckets.of(job.plan).by_shapes)
    dtypes = [getattr(torch, value.dtype) for value in job.plan.buckets[0]]

    def make(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        if dtype.is_floating_point:
            return torch.randn(shape, generator=generator).to(dtype)
        # A mask of nothing would make NaN of attention.
        tensor = torch.randint(2, shape, generator=generator)
        tensor.view(-1)[0] = 1
        return tensor.to(dtype)

    return [
        [[make(s, d) for s, d in zip(kinds[kind], dtypes, strict=True)] for _ in range(count)]
        for kind, count in counts
    ]


def expected_of(module: nn.Module, job: GraphJob, batch: list[Sample]) -> list[Outputs]:
    """What plain torch makes of each sample of a batch."""
    inputs = zip(*batch, strict=True)
    with torch.no_grad():
        if not job.plan.is_batched:
            return [pytree.tree_leaves(module(*sample)) for sample in batch]
        outputs = pytree.tree_leaves(module(*map(torch.stack, inputs)))
    return [[output[index] for output in outputs] for index in range(len(batch))]


def submit_all(
    pipeline: Pipeline, job: GraphJob, batches: list[list[Sample]]
) -> list[Future[list[Outputs]]]:
    """All at once, so that several are on their way."""
    buckets = Buckets.of(job.plan)
    futures = []
    for batch in batches:
        key = shapes_of(batch[0])
        futures.append(pipeline.submit(buckets.choose(key, len(batch)), batch))
    return futures


def stream(
    context: ParallelContext,
    case: Case,
    batches: list[list[Sample]],
    sections: dict[str, dict[str, Any]] | None = None,
) -> tuple[list[list[Outputs]], PipelineReport] | None:
    """The outputs of batches of samples; known on rank 0."""
    job = make_job(case, context.topology.tp_sizes, **sections or {})
    worker = load_worker(job, context)
    found: list[list[Outputs]] = []

    def use(pipeline: Pipeline) -> None:
        found.extend(future.result(60) for future in submit_all(pipeline, job, batches))

    report = run_worker(job, worker, context, use if context.rank == 0 else None)
    return (found, report) if report else None


def order_of_answers(context: ParallelContext, case: Case, count: int) -> list[int] | None:
    """In which order batches that are submitted from several threads' view at once are answered."""
    job = make_job(case, context.topology.tp_sizes)
    batches = make_samples(job, [(0, 1 + index % 4) for index in range(count)])
    answered: list[int] = []

    def use(pipeline: Pipeline) -> None:
        futures = submit_all(pipeline, job, batches)
        for index, future in enumerate(futures):
            future.add_done_callback(lambda _, index=index: answered.append(index))
        futures[-1].result(60)

    run_worker(job, load_worker(job, context), context, use if context.rank == 0 else None)
    return answered or None


def idle(context: ParallelContext, case: Case, seconds: float, timeout_s: float) -> Outputs | None:
    """A sample before and after a pause that is longer than what a transfer may take.

    All ranks of the pool must run this: it makes groups of its own.
    """
    own = ParallelContext.over_initialized(
        context.topology, context.rank, context.device, collective_timeout_s=timeout_s
    )
    job = make_job(case, context.topology.tp_sizes)
    worker = load_worker(job, own)
    all_gather_bytes(b"", own.setup)  # Loading takes some ranks longer than a transfer may.
    (batch,) = make_samples(job, [(0, 1)])
    found: Outputs = []

    def use(pipeline: Pipeline) -> None:
        for pause_s in (seconds, 0):
            (future,) = submit_all(pipeline, job, [batch])
            found.extend(future.result(60)[0])
            time.sleep(pause_s)

    run_worker(job, worker, own, use if own.rank == 0 else None)
    return found or None


def leave_at_once(context: ParallelContext, case: Case) -> int | None:
    """The number of batches of a pipeline that nobody asks for anything."""
    job = make_job(case, context.topology.tp_sizes)

    def use(pipeline: Pipeline) -> None:
        assert pipeline.num_batches == 0

    report = run_worker(job, load_worker(job, context), context, use if context.rank == 0 else None)
    return report.num_batches if report else None


def raise_in_use(context: ParallelContext, case: Case) -> str:
    """How each rank ends when rank 0's own work raises with batches on their way."""
    job = make_job(case, context.topology.tp_sizes)
    batches = make_samples(job, [(0, 1)] * 5)

    def use(pipeline: Pipeline) -> None:
        submit_all(pipeline, job, batches)
        raise KeyError("mine")

    try:
        run_worker(job, load_worker(job, context), context, use if context.rank == 0 else None)
    except KeyError as error:
        return str(error)
    return "ended"


def _alone(case: Case) -> tuple[GraphJob, StageWorker, Pipeline]:
    """A pipeline of one rank, which is this process."""
    job = make_job(case, [1])
    context = ParallelContext.open(Topology.of([1]), RankEnv(0, 1), device_type="cpu")
    worker = load_worker(job, context)
    return job, worker, Pipeline(worker, context, is_batched=True)


def one_bad_batch(case: Case, bad: int) -> list[str]:
    """On one rank: how each of four batches ends when the model raises on the batch `bad`."""
    job, _, pipeline = _alone(case)
    batches = make_samples(job, [(0, 1)] * 4)
    batches[bad][0][0][...] = 99
    futures = submit_all(pipeline, job, batches)
    pipeline.leave()
    pipeline.drive()
    return [type(future.exception(10)).__name__ for future in futures]


def interrupt(case: Case, at: int) -> tuple[Pipeline, list[str]]:
    """On one rank: a pipeline ended by Ctrl-C as the batch `at` of four begins; the answers."""
    job, worker, pipeline = _alone(case)
    futures = submit_all(pipeline, job, make_samples(job, [(0, 1)] * 4))
    run, begun = worker.run, count()

    def run_until(bucket: int, slot: int) -> dict[str, torch.Tensor]:
        if next(begun) == at:
            raise KeyboardInterrupt
        return run(bucket, slot)

    worker.run = run_until  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        pipeline.drive()
    return pipeline, [type(future.exception(10)).__name__ for future in futures]


def checked(
    context: ParallelContext, case: Case, sections: dict[str, dict[str, Any]]
) -> str | None:
    """The complaint of the check before a run; known on rank 0."""
    from parallel.errors import ParityError

    job = make_job(case, context.topology.tp_sizes, **sections)
    use = partial(check_sharded, job) if context.rank == 0 else None
    try:
        run_worker(job, load_worker(job, context), context, use)
    except ParityError as error:
        return str(error)
    return None


def balanced(width: int) -> Case:
    """Two equal halves; what crosses between them is small."""
    return Case(
        partial(Chain, 8, width), [_input("x", ["batch", width])], split_points={2: ["parts.4"]}
    )


def throughput(
    context: ParallelContext, num_batches: int, num_runs: int
) -> list[PipelineReport] | None:
    """Runs of full batches of 64, some tens of milliseconds each, after one to warm up; known on
    rank 0.
    """
    size = 64
    sections = {"scheduler": {"max_batch_size": size}, "compile": {"buckets": [size]}}
    job = make_job(balanced(2048), context.topology.tp_sizes, **sections)
    worker = load_worker(job, context)
    batches = make_samples(job, [(0, size)] * 4)
    in_turn = [batches[index % len(batches)] for index in range(num_batches)]

    def use(pipeline: Pipeline) -> None:
        submit_all(pipeline, job, in_turn)[-1].result(100)

    reports = []
    for _ in range(1 + num_runs):
        worker.busy.reset()
        report = run_worker(job, worker, context, use if context.rank == 0 else None)
        reports += [report] if report else []
    return reports[1:]


LOAD_POLICY = BatchingPolicy(max_batch_size=16, max_queue_delay_ms=8, max_queue_size=320)


@dataclass(frozen=True)
class LoadReport:
    """What the batches of a balanced model were.

    Attributes:
        capacity: requests a second, slowest round first.
        twice: at twice the best of them.
        half: at half the worst of them.
    """

    capacity: list[float]
    twice: BatchSnapshot
    half: BatchSnapshot


def shapes_of(sample: Sample) -> Shapes:
    return tuple(tuple(tensor.shape) for tensor in sample)


def batches_of(
    pipeline: Pipeline, job: GraphJob
) -> tuple[Callable[[Any, list[Sample]], Future[list[Outputs]]], int]:
    """What runs a batch of samples of some shapes, and how many are to be under way at once."""
    buckets = Buckets.of(job.plan)

    def execute(shapes: Any, samples: list[Sample]) -> Future[list[Outputs]]:
        return pipeline.submit(buckets.choose(shapes, len(samples)), samples)

    return execute, len(job.plan.stages) + 1


def under_load(context: ParallelContext, seconds: float) -> LoadReport | None:
    """Dynamic batching in front of a balanced model, whose batches take some milliseconds; known on
    rank 0.
    """
    size = LOAD_POLICY.max_batch_size
    buckets = {"compile": {"buckets": [1, 2, 4, 8, size]}}
    job = make_job(
        balanced(1024), context.topology.tp_sizes, scheduler={"max_batch_size": size}, **buckets
    )
    worker = load_worker(job, context)
    ((sample,),) = make_samples(job, [(0, 1)])
    found: list[LoadReport] = []

    def use(pipeline: Pipeline) -> None:
        execute, in_flight = batches_of(pipeline, job)
        load = BatchLoad(LOAD_POLICY, execute, shapes_of(sample), sample, max_in_flight=in_flight)
        load.capacities(1)
        rates = load.capacities()
        twice, half = load.send_at(2 * rates[-1], seconds), load.send_at(0.5 * rates[0], seconds)
        found.append(LoadReport(rates, twice, half))

    run_worker(job, worker, context, use if context.rank == 0 else None)
    return found[0] if found else None


def mixed_stream(
    context: ParallelContext, case: Case, samples: list[Sample], policy: BatchingPolicy
) -> tuple[list[Outputs], BatchSnapshot] | None:
    """What each sample gets from dynamic batching, asked for by four threads; known on rank 0."""
    job = make_job(
        case, context.topology.tp_sizes, scheduler={"max_batch_size": policy.max_batch_size}
    )
    worker = load_worker(job, context)
    metrics = BatchMetrics()
    found: list[Outputs] = []

    def use(pipeline: Pipeline) -> None:
        execute, in_flight = batches_of(pipeline, job)
        with (
            BatchService(policy, execute, metrics, max_in_flight=in_flight) as service,
            ThreadPoolExecutor(4) as clients,
        ):
            asked = clients.map(lambda sample: service.submit(shapes_of(sample), sample), samples)
            found.extend(answer.result(60) for answer in asked)

    run_worker(job, worker, context, use if context.rank == 0 else None)
    return (found, metrics.snapshot()) if context.rank == 0 else None


def relay(
    context: ParallelContext, sizes: Sequence[int]
) -> tuple[list[Header], list[list[torch.Tensor]]]:
    """What this rank is told and given, when every stage adds 1 to the first of two values."""
    link = Relay(context)
    headers: list[Header] = []
    kept: list[list[torch.Tensor]] = []
    steps = [Header(Order.RUN, step, step % 2) for step in range(len(sizes))]
    for said in (*steps, Header(Order.REST), Header(Order.LEAVE)):
        header = said if context.rank == 0 else link.receive_header()
        link.finish(header.slot)
        headers.append(header)
        values: list[torch.Tensor] = []
        if context.rank == 0:
            link.announce(header)
        if header.order is Order.RUN:
            start = float(header.bucket) if context.rank == 0 else -1.0
            values = [torch.full((sizes[header.bucket],), start), torch.tensor([True, False])]
            if context.is_first_stage:
                link.share(values)
            else:
                wait_for(link.begin_receive(values))
            kept.append([value.clone() for value in values])
            values = [values[0] + 1, values[1]]
        if not context.is_last_stage:
            link.send(header, values)
    link.drain()
    return headers, kept


def relay_results(context: ParallelContext, sizes: Sequence[int]) -> list[torch.Tensor]:
    """Results of several micro-batches on rank 0, with other messages between the same two."""
    link, here = Relay(context), context.coordinate
    found = [torch.empty(size) for size in sizes]
    pending = link.receive_results(found) if context.rank == 0 else []
    for step, size in enumerate(sizes):
        header = Header(Order.RUN, step) if context.rank == 0 else link.receive_header()
        if context.rank == 0:
            link.announce(header)
        if not context.is_last_stage:
            link.send(header)
        elif here.tp_rank == 0:
            link.send_results([torch.full((size,), float(header.bucket))])
        link.finish(0)
    wait_for(pending)
    return found


def run_offline(
    context: ParallelContext,
    case: Case,
    inputs: Path,
    output: Path,
    sections: dict[str, dict[str, Any]],
) -> dict[str, str] | None:
    """Compute the files of a folder: the items that failed, and why; known on rank 0."""
    job = make_job(case, context.topology.tp_sizes, **sections)
    specs = outputs_of(job.plan)
    items = list_items([inputs], output=output)
    failed: list[dict[str, str]] = []

    def use(pipeline: Pipeline) -> None:
        with open_output_folder(output, specs, chosen="npz", settings={}) as folder:
            OfflineRun(job.config, job.plan, items).use(pipeline, folder)
            failed.append(folder.summary(items).failed)

    run_worker(job, load_worker(job, context), context, use if context.rank == 0 else None)
    return failed[0] if failed else None
