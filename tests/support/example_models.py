"""The plans of examples/ at work on the ranks of a `RankPool`, at any cut and with any weights."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import chdir, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray
from rank_pool import RankPool
from torch import nn

from parallel.context import ParallelContext
from parallel.graph import Graph
from parallel.graph_stage import Value
from runner.config.load import load
from runner.config.schema import RunnerConfig
from runner.graph_planning import GraphJob
from runner.items.listing import list_items
from runner.items.writing import open_output_folder
from runner.pipeline.batch_metrics import BatchSnapshot
from runner.pipeline.buckets import Buckets
from runner.pipeline.loading import load_worker
from runner.pipeline.offline import OfflineRun, outputs_of
from runner.pipeline.pipeline import Pipeline
from runner.pipeline.rank import Use, run_worker
from runner.pipeline.stage_worker import StageWorker
from runner.sources.tensor_model import TensorModel

ROOT = Path(__file__).parents[2]

Floats = NDArray[np.float32]

_PATIENCE_S = 600


@dataclass(frozen=True)
class Example:
    """A plan of examples/ and what a test changes in it.

    Attributes:
        plan: such as "lidar/plan.yaml".
        settings: as for `--set`.
    """

    plan: str
    settings: tuple[str, ...] = ()

    def config(self, tp_sizes: Sequence[int] = (1,)) -> RunnerConfig:
        """The plan's own cut gives way to `tp_sizes`; paths are relative to the repository."""
        stages = ", ".join(f"{{tensor_parallel_size: {size}}}" for size in tp_sizes)
        cut = (f"parallel.stages=[{stages}]", f"parallel.pipeline_parallel_size={len(tp_sizes)}")
        given = (*self.settings, *cut, "parallel.device=cpu")
        with chdir(ROOT):
            return load(ROOT / "examples" / self.plan, overrides=given).config


def on_ranks(pool: RankPool, example: Example, tp_sizes: list[int]) -> Callable[[Floats], Floats]:
    """The example as one callable: (n, ...) -> the model's first output, (n, ...)."""

    def call(samples: Floats) -> Floats:
        outputs: Floats = pool.run(compute, tp_sizes, example, samples)[0]
        return outputs

    return call


def compute(context: ParallelContext, example: Example, samples: Floats) -> Floats | None:
    """The first output of each sample, in batches of the largest bucket; known on rank 0.

    The last batch holds what is left, and goes into the smallest bucket that holds it.
    """
    buckets = Buckets.of(_job(example, context.topology.tp_sizes).plan)
    shape = (samples.shape[1:],)
    size = buckets.largest(shape)
    found: list[torch.Tensor] = []

    def use(pipeline: Pipeline) -> None:
        batches = [samples[start : start + size] for start in range(0, len(samples), size)]
        futures = [
            pipeline.submit(
                buckets.choose(shape, len(batch)), [[torch.from_numpy(s)] for s in batch]
            )
            for batch in batches
        ]
        found.extend(outputs[0] for future in futures for outputs in future.result(_PATIENCE_S))

    _run(context, example, use)
    return torch.stack(found).numpy() if context.rank == 0 else None


def run_offline(
    context: ParallelContext, example: Example, inputs: Path, output: Path
) -> BatchSnapshot | None:
    """What `shardline run` does with the files of a folder; what the batches were, on rank 0."""
    job = _job(example, context.topology.tp_sizes)
    told: list[BatchSnapshot] = []

    def use(pipeline: Pipeline) -> None:
        specs, items = outputs_of(job.plan), list_items([inputs], output=output)
        with open_output_folder(output, specs, chosen="npy", settings={}) as folder:
            work = OfflineRun(job.config, job.plan, items)
            work.use(pipeline, folder)
            told.append(work.metrics())

    _run(context, example, use)
    return told[0] if told else None


def error_of(found: Floats, expected: Floats) -> float:
    """The largest difference, in units of the largest expected value."""
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def torch_outputs(module: nn.Module, samples: Floats) -> Floats:
    """What plain torch makes of each sample by itself."""
    with torch.inference_mode():
        outputs: Floats = torch.cat([module(x[None]) for x in torch.from_numpy(samples)]).numpy()
    return outputs


def _run(context: ParallelContext, example: Example, use: Use) -> None:
    job = _job(example, context.topology.tp_sizes)
    worker = _worker(example, context)
    run_worker(job, worker, context, use if context.rank == 0 else None)


@cache
def _model(example: Example) -> TensorModel:
    torch.manual_seed(0)  # random weights must be the same on all ranks
    with chdir(ROOT):
        return TensorModel.open(example.config())


@cache
def _job(example: Example, tp_sizes: tuple[int, ...]) -> GraphJob:
    with _shared_traces():
        return GraphJob.of(example.config(tp_sizes), _model(example))


@cache
def _worker(example: Example, context: ParallelContext) -> StageWorker:
    with _shared_traces():
        return load_worker(_job(example, context.topology.tp_sizes), context)


@contextmanager
def _shared_traces() -> Iterator[None]:
    """Trace a module once at each shape: all cuts of it are cuts of the same graph.

    Tracing takes seconds on every rank, far more than the little that tests compute.
    """

    def trace(
        module: nn.Module,
        inputs: Sequence[Value],
        *,
        atomic: Collection[str] = (),
        device: str = "cpu",
    ) -> Graph:
        return _traced(module, tuple(inputs), frozenset(atomic), device)

    with patch.object(Graph, "trace", trace):
        yield


_trace = Graph.trace


@cache
def _traced(
    module: nn.Module, inputs: tuple[Value, ...], atomic: frozenset[str], device: str
) -> Graph:
    return _trace(module, inputs, atomic=atomic, device=device)
