"""One decoder for all families: the part of it that one rank of one pipeline stage runs.

What differs between families is in `DecoderConfig`; how weights are split is in the plan. A layer
is written as the pieces between two collectives or attention calls, which is how it will be
compiled.
"""

from collections.abc import Callable, Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import nn

from parallel.collectives import Group
from parallel.layers import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    ParallelLMHead,
    QKVParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from parallel.plan import RankPlan, StagePlan
from runner.models.attention import Attention
from runner.models.batch import Batch
from runner.models.config import Activation, DecoderConfig
from runner.models.rope import cos_sin, frequencies, rotate

Rotation = tuple[torch.Tensor, torch.Tensor]
"""cos and sin of every token, each (num_tokens, 1, rotary_dim / 2)."""


class RMSNorm(nn.Module):
    """x / rms(x) * (offset + weight) over the last dim, in float32 inside.

    Llama rounds the normalized value to the dtype of x before it multiplies by the weight; Gemma,
    whose offset is 1, rounds once at the end.
    """

    def __init__(self, size: int, eps: float, *, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps
        self.offset = offset

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        if self.offset:
            return (normed * (self.offset + self.weight.float())).to(x.dtype)
        return self.weight * normed.to(x.dtype)


def make_norm(config: DecoderConfig, size: int) -> nn.Module:
    """The family's kind of norm over `size` features."""
    if config.norm == "layer":
        return nn.LayerNorm(size, eps=config.norm_eps)
    return RMSNorm(size, config.norm_eps, offset=1.0 if config.norm == "rms_plus_one" else 0.0)


class DecoderAttention(nn.Module):
    """Projections of this rank's heads, around the attention itself."""

    def __init__(self, config: DecoderConfig, rank_plan: RankPlan, group: Group) -> None:
        super().__init__()
        heads, head_dim = rank_plan.heads, config.head_dim
        self.qkv_proj = QKVParallelLinear(config.hidden_size, heads, head_dim, bias=config.qkv_bias)
        self.q_norm = make_norm(config, head_dim) if config.qk_norm else None
        self.k_norm = make_norm(config, head_dim) if config.qk_norm else None
        self.o_proj = RowParallelLinear(
            heads.num_query * head_dim, config.hidden_size, bias=config.o_bias, group=group
        )

    def project(self, x: torch.Tensor, rotation: Rotation | None) -> tuple[torch.Tensor, ...]:
        """Normed input (num_tokens, hidden) -> rotated q and k, and v: (num_tokens, heads,
        head_dim).
        """
        q, k, v = self.qkv_proj(x)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        return q, k, v


class DecoderMLP(nn.Module):
    """down(act(gate(x)) * up(x)), or down(act(up(x))) without a gate."""

    def __init__(self, config: DecoderConfig, rank_plan: RankPlan, group: Group) -> None:
        super().__init__()
        width = rank_plan.mlp[1] - rank_plan.mlp[0]
        hidden_size, bias = config.hidden_size, config.mlp_bias
        self.act = _ACTIVATIONS[config.activation]
        self.gated = config.gated_mlp
        self.up_proj: ColumnParallelLinear = (
            MergedColumnParallelLinear(hidden_size, (width, width), bias=bias)
            if config.gated_mlp
            else ColumnParallelLinear(hidden_size, width, bias=bias)
        )
        self.down_proj = RowParallelLinear(width, hidden_size, bias=bias, group=group)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.gated:
            gate, up = self.up_proj(x)
            inner = self.act(gate) * up
        else:
            inner = self.act(self.up_proj(x))
        output: torch.Tensor = self.down_proj(inner)
        return output


class DecoderLayer(nn.Module):
    """Attention and MLP, each normed before and added to the residual after."""

    def __init__(
        self, config: DecoderConfig, rank_plan: RankPlan, group: Group, *, index: int
    ) -> None:
        super().__init__()
        self.window = config.windows[index]
        self.scale = config.query_scale
        self.attention_norm = make_norm(config, config.hidden_size)
        self.attention = DecoderAttention(config, rank_plan, group)
        self.mlp_norm = make_norm(config, config.hidden_size)
        self.mlp = DecoderMLP(config, rank_plan, group)
        post_norms = (
            make_norm(config, config.hidden_size) if config.post_norms else nn.Identity()
            for _ in range(2)
        )
        self.attention_post_norm, self.mlp_post_norm = post_norms

    def forward(
        self,
        x: torch.Tensor,
        rotation: Rotation | None,
        attend: Attention,
        cache: torch.Tensor,
        batch: Batch,
    ) -> torch.Tensor:
        """x: (num_tokens, hidden) -> the same."""
        q, k, v = self.attention.project(self.attention_norm(x), rotation)
        heads = attend(q, k, v, cache, batch, scale=self.scale, window=self.window)
        x = x + self.attention_post_norm(self.attention.o_proj(heads))
        mlp: torch.Tensor = self.mlp_post_norm(self.mlp(self.mlp_norm(x)))
        return x + mlp


class DecoderStage(nn.Module):
    """One rank's share of one pipeline stage; parameters keep the model's global layer indices."""

    def __init__(
        self,
        config: DecoderConfig,
        stage: StagePlan,
        rank_plan: RankPlan,
        group: Group,
        *,
        attend: Attention,
        max_model_len: int,
    ) -> None:
        """Build the module without memory, on the meta device; `load` fills it.

        Args:
            group: the stage's tensor-parallel group.
            max_model_len: what length-dependent rotary frequencies are made for, in tokens.
        """
        super().__init__()
        self.config = config
        self.attend = attend
        self._max_model_len = max_model_len
        self._ropes: list[tuple[torch.Tensor, float]] = []
        with torch.device("meta"):
            self._build(stage, rank_plan, group)

    def _build(self, stage: StagePlan, rank_plan: RankPlan, group: Group) -> None:
        config = self.config
        self.layer_indices = range(*stage.layers)
        padded, hidden_size = stage.padded_vocab, config.hidden_size
        self.embed_tokens: VocabParallelEmbedding | None = None
        self.embed_positions: nn.Embedding | None = None
        if stage.has_embedding:
            self.embed_tokens = VocabParallelEmbedding(
                padded, hidden_size, rows=rank_plan.vocab, group=group
            )
            if config.learned_positions:
                self.embed_positions = nn.Embedding(config.max_positions, hidden_size)
        self.layers = nn.ModuleDict(
            {
                str(index): DecoderLayer(config, rank_plan, group, index=index)
                for index in self.layer_indices
            }
        )
        self.norm = make_norm(config, hidden_size) if stage.has_norm else None
        self.lm_head: ParallelLMHead | None = None
        if stage.has_head:
            self.lm_head = ParallelLMHead(
                padded, hidden_size, vocab_size=config.vocab_size, group=group
            )

    def load(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Take over every parameter by name, without a copy."""
        for name, tensor in tensors:
            module_name, _, parameter = name.rpartition(".")
            loaded = nn.Parameter(tensor, requires_grad=False)
            setattr(self.get_submodule(module_name), parameter, loaded)
        if self.config.tied and self.embed_tokens is not None and self.lm_head is not None:
            self.lm_head.weight = self.embed_tokens.weight
        missing = [name for name, parameter in self.named_parameters() if parameter.is_meta]
        assert not missing, f"the plan holds no tensor for {missing}"
        for rope in self.config.ropes:
            table, scale = frequencies(rope, self._max_model_len)
            self._ropes.append((table.to(next(self.parameters()).device), scale))

    @torch.inference_mode()
    def forward(
        self, batch: Batch, caches: Mapping[int, torch.Tensor], x: torch.Tensor | None
    ) -> torch.Tensor:
        """Run the stage on one step's tokens.

        Args:
            caches: for each layer index its KV cache; see `runner.models.attention.Attention`.
            x: (num_tokens, hidden), the carry from the stage before; None on the first stage.

        Returns:
            (num_tokens, hidden) for the next stage, or on the last one (num_samples, vocab_size)
            logits.
        """
        x = self._embed(batch) if x is None else x
        rotations = [
            cos_sin(table, scale, batch.positions, batch.rope_variants, x.dtype)
            for table, scale in self._ropes
        ]
        for index in self.layer_indices:
            rotation = rotations[self.config.rope_of_layer[index]] if rotations else None
            x = self.layers[str(index)](x, rotation, self.attend, caches[index], batch)
        if self.norm is not None:
            x = self.norm(x)
        return x if self.lm_head is None else self._logits(x[batch.logits_rows])

    def _embed(self, batch: Batch) -> torch.Tensor:
        assert self.embed_tokens is not None, "a stage without an embedding needs a carry"
        x: torch.Tensor = self.embed_tokens(batch.token_ids)
        if self.embed_positions is not None:
            x = x + self.embed_positions(batch.positions)
        if self.config.embedding_scale == 1.0:
            return x
        # Gemma rounds its scale to the activations' dtype before it multiplies.
        return x * torch.tensor(self.config.embedding_scale, dtype=x.dtype)

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        assert self.lm_head is not None
        logits: torch.Tensor = self.lm_head(x)
        cap = self.config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)


_ACTIVATIONS: Mapping[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
