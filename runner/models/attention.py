"""Attention over a paged KV cache: the one interface that decoder layers call.

`GatherAttention` gathers each sequence's keys and values and runs torch's SDPA on them; it is
exact, runs everywhere, and treats every sequence by itself, so that a result does not depend on
the batch. Not here: what GPUs run, and when (`runner.models.attention_choice`).
"""

from typing import Protocol

import torch
import torch.nn.functional as F

from parallel.planner import MASK_ROWS
from parallel.slicing import HeadShare
from runner.models.batch import Batch


class Attention(Protocol):
    """Writes a step's keys and values into a layer's cache and attends to what is there."""

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cache: torch.Tensor,
        batch: Batch,
        *,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        """Causal attention of one layer.

        Rows behind the last sequence's are padding: their keys and values are written where their
        slots say, and their output is zero. So is that of a sequence of length 0.

        Args:
            q: (num_tokens, num_query, head_dim).
            k, v: (num_tokens, num_kv, head_dim).
            cache: (2, num_blocks, block_size, num_kv, head_dim), keys first; written in place.
            scale: factor on the scores.
            window: how many tokens a token sees, itself included; None: all before it.

        Returns:
            (num_tokens, num_query * head_dim).
        """
        ...


class GatherAttention:
    """SDPA on keys and values gathered through the block table, one sequence at a time."""

    def __init__(self, heads: HeadShare, device: torch.device) -> None:
        self._query_to_kv = torch.tensor(heads.query_to_kv, device=device)
        self._is_grouped = heads.query_to_kv != tuple(range(heads.num_kv))
        self._groups_are_even = groups_are_even(heads)

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cache: torch.Tensor,
        batch: Batch,
        *,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        write_kv(k, v, cache, batch.slots)
        block_size = cache.shape[2]
        *sequences, padding = torch.split(q, [*batch.query_lens, len(q) - sum(batch.query_lens)])
        outputs = []
        for queries, table, kv_len in zip(
            sequences, batch.block_tables, batch.kv_lens, strict=True
        ):
            blocks = cache[:, table[: -(-kv_len // block_size)]]
            outputs.append(self._sequence(queries, blocks, kv_len, scale, window))
        return torch.cat([*outputs, torch.zeros_like(padding)]).flatten(1)

    def _sequence(
        self, q: torch.Tensor, blocks: torch.Tensor, kv_len: int, scale: float, window: int | None
    ) -> torch.Tensor:
        """All queries of one sequence, a chunk at a time, so that no mask grows with its square.

        Shapes: q (query_len, num_query, head_dim), blocks (2, num_blocks, block_size, num_kv,
        head_dim) -> (query_len, num_query, head_dim).
        """
        if len(q) == 0 or kv_len == 0:
            return torch.zeros_like(q)
        k, v = blocks.flatten(1, 2)[:, :kv_len].unbind()
        if len(q) == 1 and self._groups_are_even:
            return _decode(q, k, v, scale, window)
        if self._is_grouped:
            k, v = k[:, self._query_to_kv], v[:, self._query_to_kv]
        outputs = []
        for start in range(0, len(q), MASK_ROWS):
            chunk = q[start : start + MASK_ROWS]
            last = kv_len - len(q) + start + len(chunk)
            first = 0 if window is None else max(0, last - len(chunk) + 1 - window)
            mask = causal_mask(len(chunk), last - first, window, q.device)
            heads_first = [
                x.transpose(0, 1).unsqueeze(0) for x in (chunk, k[first:last], v[first:last])
            ]
            output = F.scaled_dot_product_attention(
                heads_first[0], heads_first[1], heads_first[2], attn_mask=mask, scale=scale
            )
            outputs.append(output.squeeze(0).transpose(0, 1))
        return torch.cat(outputs)


def groups_are_even(heads: HeadShare) -> bool:
    """Whether all KV heads are read by equally many query heads, in order."""
    group = heads.num_query // heads.num_kv
    return heads.query_to_kv == tuple(head // group for head in range(heads.num_query))


def write_kv(k: torch.Tensor, v: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
    """Put a step's keys and values into their slots of a layer's cache; see `Attention`."""
    rows = cache.flatten(1, 2)
    rows[0].index_copy_(0, slots, k)
    rows[1].index_copy_(0, slots, v)


def _decode(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int | None
) -> torch.Tensor:
    """One query token: the heads of a group are the rows of one query, so no key is copied for
    them.

    Shapes: q (1, num_query, head_dim), k and v (kv_len, num_kv, head_dim) -> that of q.
    """
    first = 0 if window is None else max(0, len(k) - window)
    k, v = (x[first:].transpose(0, 1).unsqueeze(0) for x in (k, v))
    grouped = q.view(1, k.shape[1], -1, q.shape[-1])
    return F.scaled_dot_product_attention(grouped, k, v, scale=scale).reshape(q.shape)


def causal_mask(
    query_len: int, kv_len: int, window: int | None, device: torch.device
) -> torch.Tensor | None:
    """(query_len, kv_len) bool, true where the last `query_len` tokens look; None: everywhere."""
    if query_len == 1 and (window is None or kv_len <= window):
        return None
    query = torch.arange(kv_len - query_len, kv_len, device=device)[:, None]
    key = torch.arange(kv_len, device=device)[None]
    mask = key <= query
    return mask if window is None else mask & (key > query - window)
