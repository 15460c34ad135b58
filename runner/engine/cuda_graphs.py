"""Whole steps as CUDA graphs, one for each kind and number of rows.

A step of one stage is captured with everything in it: embedding, segments, collectives, attention,
the write to the KV cache, logits and the greedy choice. Replaying it costs the host one call. Its
inputs are copied into tensors that the graph reads; all graphs share one memory pool.

A decode step has as many sequences as rows. In a mixed one any rows are whose the graph does not
know: the offsets and lengths that it reads say so.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from runner.engine.batching import Captured, StepInputs
from runner.models.batch import Batch

Forward = Callable[[Batch], tuple[torch.Tensor, ...]]
"""A stage at work on a step."""

_WARM_UPS = 2
"""Runs before a capture: libraries make their plans and workspaces in the first."""


class _Input:
    """A tensor that a graph reads, and the pinned one through which it is filled."""

    def __init__(self, initial: torch.Tensor, device: torch.device) -> None:
        self._pinned = initial.pin_memory()
        self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self.on_device = initial.to(device)

    def fill(self, values: torch.Tensor) -> None:
        """Its first rows, once the device has taken what it was filled with before; of a step that
        is under way, it may still have to.
        """
        self._copied.synchronize()
        count = len(values)
        self._pinned[:count].copy_(values)
        self.on_device[:count].copy_(self._pinned[:count], non_blocking=True)
        self._copied.record()


@dataclass
class _Graph:
    graph: torch.cuda.CUDAGraph
    longs: _Input
    ints: _Input
    tables: _Input
    outputs: tuple[torch.Tensor, ...]
    held: tuple[list[int], ...] = ()
    """Whose block tables are on the device."""


class StepGraphs:
    """The captured steps of one rank."""

    def __init__(self, device: torch.device, *, table_width: int) -> None:
        """
        Args:
            table_width: KV blocks of the longest sequence.
        """
        self._device = device
        self._table_width = table_width
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._graphs: dict[tuple[Captured, int], _Graph] = {}
        self._outputs: tuple[torch.Tensor, ...] = ()

    def close(self) -> None:
        """Let go of all that was captured."""
        for graph in self._graphs.values():
            graph.graph.reset()
        self._graphs.clear()
        self._outputs = ()

    def capture(
        self,
        kind: Captured,
        num_rows: int,
        num_seqs: int,
        forward: Forward,
        *,
        slot: int,
        longest: int,
    ) -> None:
        """Record a step in which nothing is real, the largest first: what all graphs write is as
        large as what that one does. All ranks of a stage must do so together.

        Args:
            num_seqs: with as many samples.
            slot: of the KV cache, where warming up may write.
            longest: tokens that a sequence may have.
        """
        is_decode = kind == "decode"
        longs = torch.zeros(4 * num_rows + num_seqs, dtype=torch.int64)
        longs[3 * num_rows : 4 * num_rows] = slot
        ints = torch.zeros(2 * num_seqs + 1, dtype=torch.int32)
        if is_decode:
            ints[: num_seqs + 1] = torch.arange(num_seqs + 1)
        initial = longs, ints, torch.zeros(num_seqs, self._table_width, dtype=torch.int32)
        longs_in, ints_in, tables_in = (_Input(tensor, self._device) for tensor in initial)
        inputs = StepInputs(
            longs=longs,
            ints=ints,
            tables=(),
            query_lens=(1,) * num_seqs if is_decode else (),
            kv_lens=(longest,) * num_seqs,
            num_rows=num_rows,
            num_seqs=num_seqs,
            num_samples=num_seqs,
            captured=kind,
        )
        batch = inputs.over(longs_in.on_device, ints_in.on_device, tables_in.on_device)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for _ in range(_WARM_UPS):
                made = forward(batch)
            self._outputs = self._outputs or tuple(map(torch.empty_like, made))
        torch.cuda.synchronize(self._device)
        outputs = tuple(kept[: len(new)] for kept, new in zip(self._outputs, made, strict=True))
        del made
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as NCCL's watchdog, may go on calling CUDA meanwhile.
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            for kept, new in zip(outputs, forward(batch), strict=True):
                kept.copy_(new)
        self._graphs[kind, num_rows] = _Graph(graph, longs_in, ints_in, tables_in, outputs)

    def run(self, inputs: StepInputs) -> tuple[torch.Tensor, ...]:
        """Replay a step that is laid out for it; the outputs are overwritten by the next one of any
        size.
        """
        assert inputs.captured is not None, "others run call by call"
        graph = self._graphs[inputs.captured, inputs.num_rows]
        graph.longs.fill(inputs.longs)
        graph.ints.fill(inputs.ints)
        if not _are_same(graph.held, inputs.tables):
            # What is behind them is not read: those sequences have no length.
            tables = np.zeros((len(inputs.tables), self._table_width), dtype=np.int32)
            for row, blocks in zip(tables, inputs.tables, strict=True):
                row[: len(blocks)] = blocks
            graph.tables.fill(torch.from_numpy(tables))
            graph.held = inputs.tables
        graph.graph.replay()
        return graph.outputs


def _are_same(held: tuple[list[int], ...], tables: tuple[list[int], ...]) -> bool:
    """A sequence keeps one list of blocks as long as it runs, so most steps have the same lists."""
    return len(held) == len(tables) and all(map(operator.is_, held, tables))
