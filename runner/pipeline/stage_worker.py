"""One rank's stage of a tensor model at work: its weights, its buffers, its segments."""

from collections.abc import Mapping, Sequence

import torch

from parallel.busy_clock import clock_of
from parallel.collectives import Group, all_reduce, stack
from parallel.graph_stage import Collective, Value
from parallel.progress import Doing, ProgressBoard
from runner.compiler.backend import Compiled
from runner.compiler.counter import count_compilations
from runner.pipeline.stage_program import StageProgram

NUM_SLOTS = 2
"""Sets of buffers: while one micro-batch is computed, the next arrives and the last one leaves."""

_ALIGNMENT = 256
_WARM_UPS = 2

Values = dict[str, torch.Tensor]
Runs = Mapping[str, Compiled]
"""Kind of segment -> what runs it."""


class StageWorker:
    """Runs a stage in any of its buckets.

    On a GPU each bucket and slot is one CUDA graph after `capture`; on a CPU the segments are
    called one after the other.

    Attributes:
        busy: how long it has computed.
        progress: where this rank says what it is at.
    """

    def __init__(
        self,
        programs: Sequence[StageProgram],
        runs: Sequence[Runs],
        weights: Mapping[str, torch.Tensor],
        group: Group,
        device: torch.device,
    ) -> None:
        """
        Args:
            programs: one a bucket.
            runs: for each of them what runs its segments.
            weights: of all segments, on `device`.
            group: the ranks of the stage.
        """
        self.programs = programs
        self.device = device
        self.busy = clock_of(device)
        self.progress = ProgressBoard.alone().writer(0)
        self._runs = runs
        self._group = group
        self._weights = {
            (bucket, step.segment.kind): [weights[name] for name in step.segment.weights]
            for bucket, program in enumerate(programs)
            for step in program.computations
        }
        self._slots = [_Slot(programs, device) for _ in range(NUM_SLOTS)]
        self._graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Values]] = {}

    def received(self, bucket: int, slot: int) -> Values:
        """The buffers into which a micro-batch is put, by the names of the values."""
        return self._slots[slot].buffers[bucket]

    @torch.inference_mode()
    def run(self, bucket: int, slot: int) -> Values:
        """Compute what was put into the buffers.

        Returns:
            What the stage sends; valid until the next run in this slot.
        """
        self.progress.begin_work()
        self.progress.enter(Doing.COMPUTING)
        with self.busy.running(), self._group.annotate("batch of bucket", (bucket,)):
            if captured := self._graphs.get((bucket, slot)):
                graph, sends = captured
                graph.replay()
            else:
                sends = self._compute(bucket, slot)
        self.progress.end_step(self.busy.seconds_so_far(), count_compilations())
        return sends

    @torch.inference_mode()
    def capture(self) -> None:
        """Record every bucket and slot, the largest first, as CUDA graphs.

        Those of a slot share their memory. Those of two slots cannot: while one is computed, what
        the other one made is still being sent. All ranks of the stage must call this together.
        """
        stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        pools = [torch.cuda.graph_pool_handle() for _ in range(NUM_SLOTS)]
        for bucket in reversed(range(len(self.programs))):
            for slot in range(NUM_SLOTS):
                stream.wait_stream(torch.cuda.current_stream(self.device))
                with torch.cuda.stream(stream):
                    for _ in range(_WARM_UPS):
                        self._compute(bucket, slot)
                torch.cuda.synchronize(self.device)
                graph = torch.cuda.CUDAGraph()
                # Other threads, such as NCCL's watchdog, may go on calling CUDA meanwhile.
                mode = "thread_local"
                with torch.cuda.graph(graph, pools[slot], stream, capture_error_mode=mode):
                    sends = self._compute(bucket, slot)
                self._graphs[bucket, slot] = graph, sends

    def close(self) -> None:
        """Let go of what was captured: NCCL waits for it before it closes a communicator."""
        for graph, _ in self._graphs.values():
            graph.reset()
        self._graphs.clear()

    def _compute(self, bucket: int, slot: int) -> Values:
        program = self.programs[bucket]
        values = dict(self.received(bucket, slot))
        for step in program.steps:
            if isinstance(step, Collective):
                values[step.output.name] = self._together(step, values[step.input.name])
                continue
            kind = step.segment.kind
            activations = [values[name] for name in step.inputs]
            with self._group.annotate(kind):
                outputs = self._runs[bucket][kind](*activations, *self._weights[bucket, kind])
            values.update(zip(step.outputs, outputs, strict=True))
        return {value.name: values[value.name] for value in program.sends}

    def _together(self, step: Collective, x: torch.Tensor) -> torch.Tensor:
        if step.kind == "all_reduce":
            return all_reduce(x, self._group)
        return stack(x, self._group).flatten(0, 1)


class _Slot:
    """The buffers of one micro-batch, in one block of memory that all buckets share."""

    def __init__(self, programs: Sequence[StageProgram], device: torch.device) -> None:
        sizes = [sum(_room(v) for v in program.receives) for program in programs]
        self._block = torch.zeros(max(sizes), dtype=torch.uint8, device=device)
        self.buffers = [self._views(program.receives) for program in programs]

    def _views(self, values: Sequence[Value]) -> Values:
        views, offset = {}, 0
        for value in values:
            piece = self._block[offset : offset + value.num_bytes]
            views[value.name] = piece.view(value.torch_dtype).view(value.shape)
            offset += _room(value)
        return views


def _room(value: Value) -> int:
    """Its bytes, rounded up so that the next one is aligned."""
    return -(-value.num_bytes // _ALIGNMENT) * _ALIGNMENT
