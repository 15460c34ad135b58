"""Whole decode steps as CUDA graphs, one for each number of sequences.

A step of one stage is captured with everything in it: embedding, segments, collectives, attention,
the write to the KV cache, logits and the greedy choice. Replaying it costs the host one call. Its
inputs are copied into tensors that the graph reads; all graphs share one memory pool.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch

from runner.engine.batching import StepInputs
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
        """Once the device has taken what it was filled with before; of a step that is under way,
        it may still have to.
        """
        self._copied.synchronize()
        self._pinned.copy_(values)
        self.on_device.copy_(self._pinned, non_blocking=True)
        self._copied.record()


@dataclass
class _Captured:
    graph: torch.cuda.CUDAGraph
    longs: _Input
    ints: _Input
    tables: _Input
    outputs: tuple[torch.Tensor, ...]
    held: tuple[list[int], ...] = ()
    """Whose block tables are on the device."""


class DecodeGraphs:
    """The captured decode steps of one rank."""

    def __init__(self, device: torch.device, *, table_width: int) -> None:
        """
        Args:
            table_width: KV blocks of the longest sequence.
        """
        self._device = device
        self._table_width = table_width
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._captured: dict[int, _Captured] = {}

    def close(self) -> None:
        """Let go of all that was captured."""
        for captured in self._captured.values():
            captured.graph.reset()
        self._captured.clear()

    def __contains__(self, num_seqs: int) -> bool:
        return num_seqs in self._captured

    def capture(self, num_seqs: int, forward: Forward, *, slot: int, longest: int) -> None:
        """Record a step; all ranks of a stage must do so together.

        Args:
            slot: of the KV cache, where warming up may write.
            longest: tokens that a sequence may have.
        """
        longs = torch.zeros(5 * num_seqs, dtype=torch.int64)
        longs[3 * num_seqs : 4 * num_seqs] = slot
        longs[4 * num_seqs :] = torch.arange(num_seqs)
        ints = torch.cat([torch.arange(num_seqs + 1), torch.zeros(num_seqs)]).int()
        initial = longs, ints, torch.zeros(num_seqs, self._table_width, dtype=torch.int32)
        longs_in, ints_in, tables_in = (_Input(tensor, self._device) for tensor in initial)
        inputs = StepInputs(
            longs=longs,
            ints=ints,
            tables=(),
            query_lens=(1,) * num_seqs,
            kv_lens=(longest,) * num_seqs,
            num_rows=num_seqs,
            num_seqs=num_seqs,
            num_samples=num_seqs,
            is_decode=True,
        )
        batch = inputs.over(longs_in.on_device, ints_in.on_device, tables_in.on_device)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for _ in range(_WARM_UPS):
                forward(batch)
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as NCCL's watchdog, may go on calling CUDA meanwhile.
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            outputs = forward(batch)
        self._captured[num_seqs] = _Captured(graph, longs_in, ints_in, tables_in, outputs)

    def run(self, inputs: StepInputs) -> tuple[torch.Tensor, ...]:
        """Replay a step; the outputs are overwritten by the next one of any size."""
        captured = self._captured[inputs.num_seqs]
        captured.longs.fill(inputs.longs)
        captured.ints.fill(inputs.ints)
        if not _are_same(captured.held, inputs.tables):
            tables = torch.zeros(inputs.num_seqs, self._table_width, dtype=torch.int32)
            for row, blocks in zip(tables, inputs.tables, strict=False):
                row[: len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
            captured.tables.fill(tables)
            captured.held = inputs.tables
        captured.graph.replay()
        return captured.outputs


def _are_same(held: tuple[list[int], ...], tables: tuple[list[int], ...]) -> bool:
    """A sequence keeps one list of blocks as long as it runs, so most steps have the same lists."""
    return len(held) == len(tables) and all(map(operator.is_, held, tables))
