"""The model as it was before anyone divided it, one unit at a time: what a compiled model is
compared with.
"""

from dataclasses import dataclass, replace

import torch

from parallel.collectives import Group
from parallel.decoder_plan import DecoderPlan, DecoderRankPlan, DecoderStagePlan
from parallel.random_weights import random_weights
from parallel.weights import stream
from runner.models.attention import GatherAttention
from runner.models.batch import Batch
from runner.models.decoder import DecoderStage
from runner.planning import DecoderJob, plan_of, with_sizes

EMBEDDING, HEAD = "embedding", "head"


@dataclass(frozen=True)
class Reference:
    """Makes single units of the undivided model on a device, in any dtype."""

    job: DecoderJob
    plan: DecoderPlan
    device: torch.device

    @classmethod
    def of(cls, job: DecoderJob, device: torch.device) -> "Reference":
        return cls(job, plan_of(with_sizes(job.config, tp_size=1, pp_size=1), job.spec), device)

    def unit(self, name: str, weights: dict[str, torch.Tensor], dtype: torch.dtype) -> "Unit":
        """A module of one unit: the embedding, the head with its norm, or "layers.3"."""
        config, rank_plan = self.job.spec.config, self.plan.ranks[0]
        stage = DecoderStage(
            config,
            self._stage_plan(name),
            rank_plan,
            Group.alone(),
            attend=GatherAttention(rank_plan.heads, self.device),
            max_model_len=self.plan.max_model_len,
            dtype=dtype,
        )
        stage.load((tensor_name, tensor.to(dtype)) for tensor_name, tensor in weights.items())
        return Unit(stage, rank_plan.heads.num_kv)

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        """The parameters of a unit, whole, in the model's dtype, read anew from the checkpoint."""
        wanted = self._modules(name)
        tensors = (t for t in self.plan.ranks[0].tensors if t.name.startswith(wanted))
        part = replace(self.plan.ranks[0], tensors=tuple(tensors))
        found = dict(self._read(part))
        if name == HEAD and self.job.spec.config.tied:
            found["lm_head.weight"] = found.pop("embed_tokens.weight")
        return found

    def _read(self, part: DecoderRankPlan) -> list[tuple[str, torch.Tensor]]:
        dtype = getattr(torch, self.job.plan.dtype)
        if self.job.has_random_weights:
            return list(random_weights(part, dtype=dtype, device=self.device))
        return list(stream(self.job.spec.checkpoint, part, dtype=dtype, device=self.device))

    def _modules(self, name: str) -> tuple[str, ...]:
        if name == EMBEDDING:
            return ("embed_tokens.", "embed_positions.")
        if name == HEAD:
            # A tied head is stored as the embedding.
            return ("norm.", "embed_tokens." if self.job.spec.config.tied else "lm_head.")
        return (f"{name}.",)

    def _stage_plan(self, name: str) -> DecoderStagePlan:
        index = int(name.partition(".")[2] or 0)
        is_layer = name not in (EMBEDDING, HEAD)
        return replace(
            self.plan.stages[0],
            layers=(index, index + 1) if is_layer else (0, 0),
            has_embedding=name == EMBEDDING,
            has_norm=name == HEAD,
            has_head=name == HEAD,
        )


@dataclass(frozen=True)
class Unit:
    """One unit of the undivided model, at work on steps of its own."""

    stage: DecoderStage
    num_kv_heads: int

    def run(
        self, batch: Batch, x: torch.Tensor | None, *, num_blocks: int, block_size: int
    ) -> torch.Tensor:
        """What the unit makes of x: (num_tokens, hidden), None for the embedding.

        Returns:
            (num_tokens, hidden), or of the head (num_samples, vocab_size).
        """
        shape = (2, num_blocks, block_size, self.num_kv_heads, self.stage.config.head_dim)
        device = batch.token_ids.device
        caches = {
            index: torch.zeros(shape, dtype=self.stage.dtype, device=device)
            for index in self.stage.layer_indices
        }
        output: torch.Tensor = self.stage(
            batch, caches, None if x is None else x.to(self.stage.dtype)
        )
        return output
