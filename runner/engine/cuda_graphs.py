"""Whole decode steps as CUDA graphs, one for each number of sequences.

A step of one stage is captured with everything in it: embedding, segments, collectives, attention,
the write to the KV cache, logits and the greedy choice. Replaying it costs the host one call. Its
inputs are copied into tensors that the graph reads; all graphs share one memory pool.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from runner.engine.batching import StepInputs
from runner.models.batch import Batch

Forward = Callable[[Batch], tuple[torch.Tensor, ...]]
"""A stage at work on a step."""

_WARM_UPS = 2
"""Runs before a capture: libraries make their plans and workspaces in the first."""


@dataclass
class _Captured:
    graph: torch.cuda.CUDAGraph
    longs: torch.Tensor
    ints: torch.Tensor
    tables: torch.Tensor
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
        inputs = StepInputs(
            longs=longs.to(self._device),
            ints=ints.to(self._device),
            tables=(),
            query_lens=(1,) * num_seqs,
            kv_lens=(longest,) * num_seqs,
            num_rows=num_seqs,
            num_seqs=num_seqs,
            num_samples=num_seqs,
            is_decode=True,
        )
        tables = torch.zeros(num_seqs, self._table_width, dtype=torch.int32, device=self._device)
        batch = inputs.over(inputs.longs, inputs.ints, tables)
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
        captured = _Captured(graph, inputs.longs, inputs.ints, tables, outputs)
        self._captured[num_seqs] = captured

    def run(self, inputs: StepInputs) -> tuple[torch.Tensor, ...]:
        """Replay a step; the outputs are overwritten by the next one of any size."""
        captured = self._captured[inputs.num_seqs]
        captured.longs.copy_(inputs.longs.pin_memory(), non_blocking=True)
        captured.ints.copy_(inputs.ints.pin_memory(), non_blocking=True)
        # A sequence keeps its list of blocks as long as it runs, so most steps have the same.
        if captured.held != inputs.tables:
            tables = torch.zeros(captured.tables.shape, dtype=torch.int32)
            for row, blocks in zip(tables, inputs.tables, strict=False):
                row[: len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
            captured.tables.copy_(tables.pin_memory(), non_blocking=True)
            captured.held = tuple(list(blocks) for blocks in inputs.tables)
        captured.graph.replay()
        return captured.outputs
