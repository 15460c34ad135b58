"""Rank 0 of `shardline run`: items are read, batched, computed and written, many at a time.

Each item has a thread that reads it, waits for its outputs and writes them, so that reading,
computing and writing overlap; how many there are at once bounds the memory.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from threading import Semaphore
from typing import Any

import numpy as np
import torch

from parallel.errors import ConfigError, ShardlineError
from parallel.graph_plan import GraphPlan
from parallel.plan import DTYPE_BYTES
from runner.config.schema import RunnerConfig
from runner.items.item import Item, ItemError
from runner.items.preprocess import ImagePreprocess, Preprocess, VolumePreprocess
from runner.items.progress import ItemProgress
from runner.items.reading import read_item
from runner.items.spec import Array, ArraySpec
from runner.items.stitching import Stitcher
from runner.items.tiling import Tiling
from runner.items.writing import OutputFolder
from runner.pipeline.batch_metrics import BatchMetrics, BatchSnapshot
from runner.pipeline.batch_service import BatchService
from runner.pipeline.batching_policy import BatchingPolicy
from runner.pipeline.buckets import Buckets, Shapes
from runner.pipeline.pipeline import Pipeline, Sample

_READERS = 4
"""Items that are decoded at once."""


@dataclass(frozen=True)
class Inputs:
    """How an item becomes samples.

    Attributes:
        specs: one for each input, as `read_item` takes them.
        tiling: None: an item is one sample.
    """

    specs: tuple[ArraySpec, ...]
    preprocess: Preprocess
    tiling: Tiling | None

    @classmethod
    def of(cls, config: RunnerConfig, plan: GraphPlan) -> "Inputs":
        """Raises ConfigError: sizes that contradict one another, windows that fit no input."""
        tiling = tiling_of(config)
        if tiling:
            _check_tiling(tiling, plan)
        specs = []
        for declared, dims in zip(plan.buckets[-1], Buckets.of(plan).dims, strict=True):
            if tiling:
                dims = (*dims[: -len(tiling.roi_size)], *(None for _ in tiling.roi_size))
            specs.append(ArraySpec(declared.name, declared.dtype, dims))
        return cls(tuple(specs), preprocess_of(config), tiling)


def _check_tiling(tiling: Tiling, plan: GraphPlan) -> None:
    """Every window is a sample, so there must be buckets for it."""
    roi = tiling.roi_size
    if len(plan.buckets[0]) != 1:
        names = ", ".join(value.name for value in plan.buckets[0])
        raise ConfigError(f"tiling is for models of one input, this one has {names}; drop it")
    shapes = list(Buckets.of(plan).by_shapes)
    if not any(sample[-len(roi) :] == roi and len(sample) == len(roi) + 1 for (sample,) in shapes):
        raise ConfigError(
            f"tiling.roi_size={list(roi)} is in no bucket: samples are "
            f"{'; '.join(str(list(sample)) for (sample,) in shapes)}, channels first; give the "
            "spatial sizes of one of them"
        )


def outputs_of(plan: GraphPlan) -> tuple[ArraySpec, ...]:
    """What a run writes for one item; the sizes of dims are known where there is one shape."""
    first = 1 if plan.is_batched else 0
    has_one_shape = len(Buckets.of(plan).by_shapes) == 1
    return tuple(
        ArraySpec(
            output.name,
            "float32" if output.dtype in DTYPE_BYTES else output.dtype,
            tuple(int(size) if has_one_shape else None for size in output.shape[first:]),
        )
        for output in plan.outputs
    )


def tiling_of(config: RunnerConfig) -> Tiling | None:
    """The windows that the configuration asks for."""
    given = config.tiling
    if given is None:
        return None
    return Tiling(
        tuple(given.roi_size),
        overlap=given.overlap,
        sw_batch_size=given.sw_batch_size or config.scheduler.max_batch_size,
        mode=given.mode,
        sigma_scale=given.sigma_scale,
    )


def preprocess_of(config: RunnerConfig) -> Preprocess:
    """Raises ConfigError: values that contradict one another."""
    given = config.model.preprocess
    return Preprocess(
        ImagePreprocess(**_with_tuples(given.image.model_dump())),
        VolumePreprocess(**_with_tuples(given.volume.model_dump())),
    )


class OfflineRun:
    """Computes the items that have no result yet."""

    def __init__(self, config: RunnerConfig, plan: GraphPlan, items: Sequence[Item]) -> None:
        """Raises ConfigError: sizes that contradict one another, windows that fit no input."""
        self._config = config
        self._plan = plan
        self._items = items
        self._inputs = Inputs.of(config, plan)
        self._policy = self._make_policy()
        self._buckets = Buckets.of(plan)
        self._reading = Semaphore(_READERS)
        self._metrics = BatchMetrics()
        self._service: BatchService[Sample, list[torch.Tensor]] | None = None

    def use(self, pipeline: Pipeline, folder: OutputFolder) -> None:
        """Compute what the folder lacks; see `runner.pipeline.rank.Use`."""
        remaining = folder.remaining(self._items)
        done = len(self._items) - len(remaining)

        def execute(key: Any, samples: list[Sample]) -> Future[list[list[torch.Tensor]]]:
            return pipeline.submit(self._buckets.choose(key, len(samples)), samples)

        stages = len(self._plan.stages)
        with (
            BatchService(
                self._policy, execute, self._metrics, max_in_flight=stages + 1
            ) as self._service,
            ThreadPoolExecutor(self._window(stages), thread_name_prefix="item") as threads,
            ItemProgress(len(self._items), done) as progress,
        ):
            futures = [threads.submit(self._compute, item, folder) for item in remaining]
            try:
                for future in as_completed(futures):
                    progress.advance(failed=future.result() is not None)
            except BaseException:
                for future in futures:
                    future.cancel()
                raise

    def metrics(self) -> BatchSnapshot:
        """What the batches were."""
        return self._metrics.snapshot()

    def _make_policy(self) -> BatchingPolicy:
        """Of items that are on the disk none is refused, so the queue holds one item at least."""
        return BatchingPolicy.of(
            self._config.scheduler,
            is_batched=self._plan.is_batched,
            min_queue_size=self._samples_of_item(),
        )

    def _window(self, stages: int) -> int:
        """Items at once: enough for two full batches a stage, and all they ask for is queued."""
        scheduler = self._config.scheduler
        wanted = 2 * scheduler.max_batch_size * (stages + 1)
        return max(1, min(wanted, scheduler.max_queue_size) // self._samples_of_item())

    def _samples_of_item(self) -> int:
        """The most that one item has in the pipeline at once."""
        tiling = self._inputs.tiling
        return tiling.sw_batch_size * (len(self._plan.stages) + 1) if tiling else 1

    def _compute(self, item: Item, folder: OutputFolder) -> ItemError | None:
        """One item from its file to its result; why not, if it is the item's fault."""
        try:
            with self._reading:
                arrays = read_item(item, self._inputs.specs, self._inputs.preprocess)
            outputs = self._tiled(item, arrays) if self._inputs.tiling else self._run(item, arrays)
            folder.write(item, outputs)
        except ItemError as error:
            folder.record_failure(item, error)
            return error
        return None

    def _run(self, item: Item, arrays: Mapping[str, Array]) -> dict[str, Array]:
        return self._named(self._submit(item, list(arrays.values())).result())

    def _tiled(self, item: Item, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """Windows go through the pipeline as samples, a few batches of them at a time."""
        tiling, (sample,) = self._inputs.tiling, arrays.values()
        assert tiling is not None
        stitchers = {o.name: Stitcher(sample.shape[1:], tiling) for o in self._plan.outputs}
        waiting: list[tuple[Any, list[Future[list[torch.Tensor]]]]] = []

        def take(windows: Any, futures: list[Future[list[torch.Tensor]]]) -> None:
            found = [self._named(future.result()) for future in futures]
            for name, stitcher in stitchers.items():
                stitcher.add(windows, np.stack([outputs[name] for outputs in found]))

        for windows, patches in tiling.batches(sample):
            waiting.append((windows, [self._submit(item, [patch]) for patch in patches]))
            if len(waiting) > len(self._plan.stages):
                take(*waiting.pop(0))
        for windows, futures in waiting:
            take(windows, futures)
        return {name: stitcher.result() for name, stitcher in stitchers.items()}

    def _submit(self, item: Item, arrays: Sequence[Array]) -> Future[list[torch.Tensor]]:
        assert self._service is not None
        key: Shapes = tuple(array.shape for array in arrays)
        try:
            self._buckets.check(key)
        except ShardlineError as error:
            raise item.error(str(error)) from None
        # A decoder may lend its own memory, which torch must not be told to write to.
        owned = [array if array.flags.writeable else array.copy() for array in arrays]
        return self._service.submit(key, [torch.from_numpy(array) for array in owned])

    def _named(self, outputs: Sequence[torch.Tensor]) -> dict[str, Array]:
        """Outputs by name; numpy has no bfloat16, so floating-point ones are float32."""
        names = [output.name for output in self._plan.outputs]
        arrays = [o.float() if o.is_floating_point() else o for o in outputs]
        return {name: array.numpy() for name, array in zip(names, arrays, strict=True)}


def _with_tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
