"""One rank's stage at work: its module, its KV cache, and the transfers before and after it."""

from dataclasses import dataclass, field, replace
from functools import partial

import torch

from parallel.annotate import unnamed
from parallel.busy_clock import HostClock, StreamClock, clock_of
from parallel.collectives import all_reduce, minimum
from parallel.context import ParallelContext
from parallel.progress import Doing, ProgressBoard, ProgressWriter
from parallel.transfer import CarryTransfer
from runner.engine.batching import Captured, Padding, StepInputs, known_ids
from runner.engine.cuda_graphs import StepGraphs
from runner.engine.sampler import choose_greedily
from runner.models.attention_choice import captures_prompts, is_capturable
from runner.models.batch import Batch
from runner.models.decoder import DecoderStage
from runner.models.part import Execute


@dataclass(frozen=True)
class StepOutput:
    """What the last stage knows after a step.

    Attributes:
        logits: (num_samples, vocab_size), valid until the next step.
        greedy: (num_samples,) int64; see `choose_greedily`.
        last_ids: (num_samples,) int64, the tokens that the chosen ones follow.
    """

    logits: torch.Tensor
    greedy: torch.Tensor
    last_ids: torch.Tensor


@dataclass
class StageRunner:
    """Runs this rank's part of a step.

    Attributes:
        execute: runs the stage's parts in compiled form; None: by PyTorch.
        progress: where this rank says what it is at.
        busy: how long it has computed.
        num_blocks, block_size: of the KV cache, without the block for padding. Set by `allocate`.
        padding: how steps are filled up; None: not at all. Set by `allocate`.
        latest: (max_num_seqs,) int64, what the last step chose, where the next one is laid out
            before the host has read it; None: it never is.
    """

    context: ParallelContext
    stage: DecoderStage
    transfer: CarryTransfer
    num_kv_heads: int
    execute: Execute | None = None
    buckets: tuple[int, ...] = ()
    caches: dict[int, torch.Tensor] = field(default_factory=dict)
    num_blocks: int = 0
    block_size: int = 0
    padding: Padding | None = None
    latest: torch.Tensor | None = None
    progress: ProgressWriter = field(default_factory=lambda: ProgressBoard.alone().writer(0))
    busy: HostClock | StreamClock = field(init=False)
    _graphs: StepGraphs | None = None

    def __post_init__(self) -> None:
        self.busy = clock_of(self.context.device)

    def annotate_segments(self) -> None:
        """Let every segment run under its name, where a profiler is to see names."""
        annotate, run = self.context.annotate, self.execute or self.stage.run_eagerly
        if annotate is unnamed:
            return

        def named(name: str, *activations: torch.Tensor) -> tuple[torch.Tensor, ...]:
            with annotate(name):
                return run(name, *activations)

        self.execute = named

    def allocate(self, num_blocks: int, block_size: int) -> None:
        """Reserve the KV cache of every layer of the stage, and a block for padding."""
        self.num_blocks, self.block_size = num_blocks, block_size
        like = next(self.stage.parameters())
        shape = (2, num_blocks + 1, block_size, self.num_kv_heads, self.stage.config.head_dim)
        for index in self.stage.layer_indices:
            self.caches[index] = like.new_zeros(shape)
        if self.buckets:
            self.padding = Padding(self.buckets, num_blocks)

    def keep_latest(self, max_num_seqs: int) -> None:
        """Have steps take tokens that the host has not read from `latest`; to be called before
        `capture`.
        """
        self.latest = torch.zeros(max_num_seqs, dtype=torch.int64, device=self.context.device)

    def can_capture(self) -> bool:
        """Whether all ranks can capture steps, for they do so together or not at all. All must call
        this together, after `allocate`.
        """
        is_possible = is_capturable(self.stage.attend, self.block_size)
        return bool(minimum(is_possible, self.context.setup))

    def capture(self, *, max_num_seqs: int, max_model_len: int, mixed_rows: int) -> None:
        """Record steps of up to `max_num_seqs` sequences as CUDA graphs, the largest first, so that
        the smaller ones fit into its memory.

        All ranks must call this together, after `allocate`.

        Args:
            mixed_rows: of a step that holds prompts, at most, if these can be captured; 0: none.
        """
        assert self.padding is not None, "a captured step is padded"
        most: dict[Captured, int] = {
            "decode": self.padding.bucket(min(max_num_seqs, self.buckets[-1]))
        }
        if minimum(captures_prompts(self.stage.attend), self.context.setup):
            most["mixed"] = max((b for b in self.buckets if b <= mixed_rows), default=0)
        padding = replace(self.padding, captured=most, most_seqs=max_num_seqs)
        width = -(-max_model_len // self.block_size)
        graphs = StepGraphs(self.context.device, table_width=width)
        slot = padding.scratch_block * self.block_size
        steps = [(num_rows, kind) for kind in most for num_rows in padding.sizes(kind)]
        for num_rows, kind in sorted(steps, reverse=True):
            carry = next(iter(self.transfer.incoming(num_rows)), None)
            num_seqs = padding.num_seqs(kind, num_rows)
            forward = partial(self._forward, carry=carry)
            graphs.capture(kind, num_rows, num_seqs, forward, slot=slot, longest=max_model_len)
        self.padding, self._graphs = padding, graphs

    def close(self) -> None:
        """Let go of what was captured: NCCL waits for it before it closes a communicator."""
        if self._graphs:
            self._graphs.close()

    def run(self, inputs: StepInputs) -> StepOutput | None:
        """Take the carry, run the stage, pass the carry on.

        Returns:
            What was chosen among, on the last stage; None on the others.
        """
        carry = None
        if not self.context.is_first_stage:
            self.progress.enter(Doing.RECEIVING)
            carry = self.transfer.receive(inputs.num_rows)[0]
        self.progress.enter(Doing.COMPUTING)
        name = "stage", (self.context.coordinate.stage,)
        with self.context.annotate(*name), self.busy.running():
            if self._graphs and inputs.captured:
                # It writes where the carry of the step before lies.
                self.transfer.drain()
                outputs = self._graphs.run(inputs)
            else:
                outputs = self._forward(inputs.to(self.context.device), carry)
        if self.context.is_last_stage:
            return StepOutput(*(x[: inputs.num_samples] for x in outputs))
        self.progress.enter(Doing.SENDING)
        self.transfer.send(outputs)
        return None

    def rest(self) -> None:
        """An empty step, through every link and group of the stage; returns when it is over."""
        self.progress.enter(Doing.RECEIVING)
        self.transfer.pass_nothing()
        self.progress.enter(Doing.COMPUTING)
        here = torch.ones(1, device=self.context.device)
        num_here = all_reduce(here, self.context.tp).item()
        assert num_here == self.context.tp.size, "every rank of the stage adds one"

    def _forward(self, batch: Batch, carry: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        if self.latest is not None:
            batch = replace(batch, token_ids=known_ids(batch.token_ids, self.latest))
        output: torch.Tensor = self.stage(batch, self.caches, carry, self.execute)
        if self.context.is_last_stage:
            return output, choose_greedily(output), batch.token_ids[batch.logits_rows]
        return (output,)
