"""`DecoderPlan`: who holds what of a language model. Made by `parallel.planner`, from the headers
of a checkpoint alone.
"""

from dataclasses import dataclass
from typing import Literal

from parallel.plan import RankPlan, ShardPlan, StagePlan
from parallel.slicing import HeadShare, Range


@dataclass(frozen=True)
class DecoderRankPlan(RankPlan):
    """What one rank holds.

    Attributes:
        heads: its attention heads, equal in every layer of its stage.
        mlp: its columns of the MLP's intermediate size.
        vocab: its rows of the vocabulary.
        kv_bytes_per_token: keys and values of one token in all layers of its stage.
    """

    heads: HeadShare
    mlp: Range
    vocab: Range
    kv_bytes_per_token: int


@dataclass(frozen=True)
class DecoderStagePlan(StagePlan):
    """What one pipeline stage runs; its units have the checkpoint's names.

    Attributes:
        layers: global indices of its decoder layers.
        has_embedding, has_norm, has_head: whether those units are here.
        padded_vocab: logits columns of each of its ranks.
        cost: bytes of weights that its ranks together read in one decoding step.
    """

    layers: Range
    has_embedding: bool
    has_norm: bool
    has_head: bool
    padded_vocab: int
    cost: int


@dataclass(frozen=True)
class DecoderPlan(ShardPlan):
    """The division of one language model over the ranks of one job."""

    kind: Literal["decoder"]
    stages: tuple[DecoderStagePlan, ...]
    ranks: tuple[DecoderRankPlan, ...]
    max_model_len: int
    max_num_batched_tokens: int

    @property
    def pipeline_bubble(self) -> float:
        """Share of the stages' time spent waiting while one batch at a time passes through them."""
        return 1 - 1 / len(self.stages)
