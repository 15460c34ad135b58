"""What a decoder layer computes between two collectives or attention calls.

Each part is a pure module of one rank's tensors, so that it can become a segment. A part that ends
in a row-parallel matrix returns this rank's partial sum; whoever calls it adds them up, and the
next part takes the sum as `delta`. On a stage of one rank nothing lies between these parts, and
`Block` joins them.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import nn

from parallel.decoder_plan import DecoderRankPlan
from parallel.layers import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    ParallelLMHead,
    QKVParallelLinear,
    RowParallelLinear,
)
from runner.models.config import Activation, DecoderConfig
from runner.models.norm import make_norm
from runner.models.rope import rotate


class QKV(nn.Module):
    """Norm, projections of this rank's heads, and their rotation."""

    def __init__(self, config: DecoderConfig, rank_plan: DecoderRankPlan) -> None:
        super().__init__()
        head_dim = config.head_dim
        self.norm = make_norm(config, config.hidden_size)
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size, rank_plan.heads, head_dim, bias=config.qkv_bias
        )
        self.q_norm = make_norm(config, head_dim) if config.qk_norm else None
        self.k_norm = make_norm(config, head_dim) if config.qk_norm else None

    def forward(self, x: torch.Tensor, *rotation: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """
        Args:
            x: (num_tokens, hidden).
            rotation: cos and sin, each (num_tokens, 1, rotary_dim / 2), where the model has them.

        Returns:
            q, k, v: each (num_tokens, heads, head_dim).
        """
        q, k, v = self.qkv_proj(self.norm(x))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotation:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        return q, k, v


class MLP(nn.Module):
    """Norm, then this rank's part of down(act(gate(x)) * up(x)), or of down(act(up(x)))."""

    def __init__(self, config: DecoderConfig, rank_plan: DecoderRankPlan) -> None:
        super().__init__()
        width = rank_plan.mlp[1] - rank_plan.mlp[0]
        hidden_size, bias = config.hidden_size, config.mlp_bias
        self.norm = make_norm(config, hidden_size)
        self.act = _ACTIVATIONS[config.activation]
        self.gated = config.gated_mlp
        self.up_proj: ColumnParallelLinear = (
            MergedColumnParallelLinear(hidden_size, (width, width), bias=bias)
            if config.gated_mlp
            else ColumnParallelLinear(hidden_size, width, bias=bias)
        )
        self.down_proj = RowParallelLinear(width, hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(num_tokens, hidden) -> the same, to be summed over the group."""
        x = self.norm(x)
        if self.gated:
            gate, up = self.up_proj(x)
            inner = self.act(gate) * up
        else:
            inner = self.act(self.up_proj(x))
        partial: torch.Tensor = self.down_proj(inner)
        return partial


class Residual(nn.Module):
    """x + norm(delta + bias): the end of an attention or an MLP, once its sum is complete."""

    def __init__(self, config: DecoderConfig, *, bias: bool) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.empty(config.hidden_size)) if bias else None
        self.norm = make_norm(config, config.hidden_size) if config.post_norms else None

    def forward(self, x: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        if self.bias is not None:
            delta = delta + self.bias
        if self.norm is not None:
            delta = self.norm(delta)
        return x + delta


class AddMLP(nn.Module):
    """Close the attention, then the MLP: (x, delta) -> (x, partial delta)."""

    def __init__(self, residual: Residual, mlp: MLP) -> None:
        super().__init__()
        self.residual = residual
        self.mlp = mlp

    def forward(self, x: torch.Tensor, delta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.residual(x, delta)
        return x, self.mlp(x)


class AddQKV(nn.Module):
    """Close the MLP, then the next layer's QKV: (x, delta, rotation) -> (x, q, k, v)."""

    def __init__(self, residual: Residual, qkv: QKV) -> None:
        super().__init__()
        self.residual = residual
        self.qkv = qkv

    def forward(
        self, x: torch.Tensor, delta: torch.Tensor, *rotation: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        x = self.residual(x, delta)
        return x, *self.qkv(x, *rotation)


class Block(nn.Module):
    """All that one rank computes between two attention calls: (x, heads, rotation) -> what `end`
    returns, x first.

    Args:
        end: the next layer's `AddQKV`, or the `Residual` that closes a stage's last layer.
    """

    def __init__(self, o_proj: RowParallelLinear, add_mlp: AddMLP, end: AddQKV | Residual) -> None:
        super().__init__()
        self.o_proj = o_proj
        self.add_mlp = add_mlp
        self.end = end

    def forward(
        self, x: torch.Tensor, heads: torch.Tensor, *rotation: torch.Tensor
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        output: torch.Tensor | tuple[torch.Tensor, ...]
        output = self.end(*self.add_mlp(x, self.o_proj(heads)), *rotation)
        return output


class Head(nn.Module):
    """The last norm and this rank's columns of the logits: (num_rows, hidden) -> (num_rows,
    columns).
    """

    def __init__(self, norm: nn.Module, lm_head: ParallelLMHead) -> None:
        super().__init__()
        self.norm = norm
        self.lm_head = lm_head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.lm_head(self.norm(x))
        return logits


_ACTIVATIONS: Mapping[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
