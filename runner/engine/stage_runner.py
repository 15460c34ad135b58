"""One rank's stage at work: its module, its KV cache, and the transfers before and after it."""

from dataclasses import dataclass, field

import torch

from parallel.context import ParallelContext
from parallel.plan import ShardPlan
from parallel.transfer import CarryTransfer
from parallel.weights import stream
from runner.models.attention import GatherAttention
from runner.models.batch import Batch
from runner.models.decoder import DecoderStage
from runner.models.spec import ModelSpec


@dataclass(frozen=True)
class StageRunner:
    """Runs this rank's part of a step."""

    context: ParallelContext
    stage: DecoderStage
    transfer: CarryTransfer
    num_kv_heads: int
    caches: dict[int, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def load(cls, spec: ModelSpec, plan: ShardPlan, context: ParallelContext) -> "StageRunner":
        """Build the stage and read its weights; the KV cache comes later, by `allocate`.

        Raises:
            IntegrityError: a weight cannot be read.
        """
        rank_plan = plan.ranks[context.rank]
        dtype = getattr(torch, plan.dtype)
        stage = DecoderStage(
            spec.config,
            plan.stages[rank_plan.stage],
            rank_plan,
            context.tp,
            attend=GatherAttention(rank_plan.heads, context.device),
            max_model_len=plan.max_model_len,
            dtype=dtype,
        )
        stage.load(stream(spec.checkpoint, rank_plan, dtype=dtype, device=context.device))
        transfer = CarryTransfer(context, plan)
        return cls(context, stage, transfer, rank_plan.heads.num_kv)

    def allocate(self, num_blocks: int, block_size: int) -> None:
        """Reserve the KV cache of every layer of the stage."""
        like = next(self.stage.parameters())
        shape = (2, num_blocks, block_size, self.num_kv_heads, self.stage.config.head_dim)
        for index in self.stage.layer_indices:
            self.caches[index] = like.new_zeros(shape)

    def run(self, batch: Batch) -> torch.Tensor | None:
        """Take the carry, run the stage, pass the carry on.

        Returns:
            (num_samples, vocab_size) logits on the last stage; None on the others.
        """
        carry = None if self.context.is_first_stage else self.transfer.receive(batch.num_tokens)[0]
        output: torch.Tensor = self.stage(batch, self.caches, carry)
        if self.context.is_last_stage:
            return output
        self.transfer.send([output])
        return None
