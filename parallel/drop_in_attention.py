"""`HeadwiseAttention`: what takes the place of an nn.MultiheadAttention, with one rank's heads.

For inference: attention dropout is not applied. It has no fast path of torch's own, which would
read parameters without a word to the other ranks.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from parallel.collectives import all_gather_parts, all_reduce
from parallel.drop_ins import Blocks, DropIn, Place, RowwiseLinear
from parallel.errors import ConfigError


class HeadwiseAttention(DropIn):
    """An nn.MultiheadAttention with its heads split, and one all-reduce after its `out_proj`.

    Asking for the attention weights costs another collective, so modules do well to pass
    `need_weights=False`. Its `in_proj_weight` and `in_proj_bias` are copies, the only ones that
    drop-ins make: their three blocks do not lie side by side.

    Shapes: as those of nn.MultiheadAttention; all inputs and outputs are whole on every rank.
    """

    in_proj_weight: nn.Parameter | None
    in_proj_bias: nn.Parameter | None
    q_proj_weight: nn.Parameter
    k_proj_weight: nn.Parameter
    v_proj_weight: nn.Parameter

    def __init__(self, whole: nn.MultiheadAttention, place: Place) -> None:
        super().__init__(place)
        _refuse_options(whole, place)
        self.embed_dim, self.kdim, self.vdim = whole.embed_dim, whole.kdim, whole.vdim
        self.num_heads, self.head_dim = whole.num_heads, whole.head_dim
        self.batch_first = whole.batch_first
        # The layers and encoders of torch ask for it before they take their fast path.
        self._qkv_same_embed_dim = False
        self.heads = place.split(whole.num_heads, "heads")
        start, stop = (head * whole.head_dim for head in self.heads[place.group.rank])
        firsts = (0, self.embed_dim, 2 * self.embed_dim)
        merged = Blocks(0, tuple((first + start, first + stop) for first in firsts))
        for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
            self._hold(name, getattr(whole, name), Blocks(0, ((start, stop),)), place)
        for name in ("in_proj_weight", "in_proj_bias"):
            self._hold(name, getattr(whole, name), merged, place)
        self.out_proj = RowwiseLinear(
            whole.out_proj, place.inner("out_proj"), split_input=False, columns=(start, stop)
        )

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As nn.MultiheadAttention: `is_causal` is a hint that says nothing new about the mask."""
        if is_causal and attn_mask is None:
            raise ConfigError(
                f"{self.name}: is_causal=True needs attn_mask, as in nn.MultiheadAttention; the "
                "model must pass the mask"
            )
        batched = query.dim() == 3
        q, k, v = (self._by_head(x, batched) for x in self._project(query, key, value))
        mask = self._mask(attn_mask, key_padding_mask, q)
        weights = None
        if need_weights:
            scores = (q / math.sqrt(self.head_dim)) @ k.transpose(-2, -1)
            weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
            attended = weights @ v
        else:
            attended = F.scaled_dot_product_attention(q, k, v, mask)
        order = (0, 2, 1, 3) if self.batch_first or not batched else (2, 0, 1, 3)
        output = self.out_proj(attended.permute(order).flatten(2))
        if weights is not None:
            weights = self._whole_weights(weights, average_attn_weights)
        if batched:
            return output, weights
        return output.squeeze(0), None if weights is None else weights.squeeze(0)

    def _project(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values of this rank's heads: (..., local heads x head_dim) each."""
        if self.in_proj_weight is not None and query is key and key is value:
            merged = F.linear(query, self.in_proj_weight, self.in_proj_bias)
            return merged.chunk(3, dim=-1)
        if self.in_proj_weight is not None:
            matrices = self.in_proj_weight.chunk(3)
        else:
            matrices = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return tuple(map(F.linear, (query, key, value), matrices, biases))

    def _by_head(self, x: torch.Tensor, batched: bool) -> torch.Tensor:
        """-> (batch, local heads, length, head_dim)."""
        if not batched:
            x = x.unsqueeze(0)
        elif not self.batch_first:
            x = x.transpose(0, 1)
        return x.view(*x.shape[:-1], -1, self.head_dim).transpose(1, 2)

    def _mask(
        self,
        attn_mask: torch.Tensor | None,
        key_padding_mask: torch.Tensor | None,
        q: torch.Tensor,
    ) -> torch.Tensor | None:
        """Both masks as one that is added to the scores of this rank's heads.

        Args:
            attn_mask: (queries, keys), or (batch x num_heads, queries, keys) with all heads of the
                model; bool, True where a query must not look, or added.
            key_padding_mask: (batch, keys) or (keys,); likewise.
            q: (batch, local heads, queries, head_dim); gives batch size and dtype.
        """
        mask = None
        if attn_mask is not None:
            if attn_mask.dim() == 3:
                start, stop = self.heads[self.group.rank]
                attn_mask = attn_mask.view(len(q), self.num_heads, *attn_mask.shape[1:])
                attn_mask = attn_mask[:, start:stop]
            mask = _added(attn_mask, q.dtype)
        if key_padding_mask is not None:
            padding = _added(key_padding_mask, q.dtype).view(len(q), 1, 1, -1)
            mask = padding if mask is None else mask + padding
        return mask

    def _whole_weights(self, weights: torch.Tensor, average: bool) -> torch.Tensor:
        """(batch, local heads, queries, keys) -> of all heads, or their mean without that dim."""
        if average:
            mean: torch.Tensor = all_reduce(weights.sum(dim=1), self.group) / self.num_heads
            return mean
        extents = [stop - start for start, stop in self.heads]
        return all_gather_parts(weights, extents, self.group, dim=-3)


def _added(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask in the form that is added to scores."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)


def _refuse_options(whole: nn.MultiheadAttention, place: Place) -> None:
    for option, used in (
        ("add_bias_kv", whole.bias_k is not None),
        ("add_zero_attn", whole.add_zero_attn),
    ):
        if used:
            raise ConfigError(
                f"parallel.tp_plan: {place.name} has {option}=True, whose extra key belongs to all "
                "heads; such an attention is not split, replicate it"
            )
